"""What a model is worth: bits/dim, the quality of its samples, and whether they are copies of training images."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from .card import CardFacts, write_card
from .command_config import EvaluateConfig
from .evaluation_plots import save_neighbours
from .extractors import Extractor
from .likelihood_figures import (
    likelihood_details,
    rate_distortion_table,
    resumable_bits_per_dim,
    save_likelihood,
)
from .metrics_file import MetricsFile, describe, eval_result
from .nearest import nearest_neighbours, nearness
from .pipeline import DDPMPipelineCustom
from .probing import draw_indices
from .real_images import RealImages
from .sample_folder import sample_to_folder
from .sampling import describe_sampling

NEIGHBOURS = 3
PACKAGES = ("ddpm-hf", "torch", "diffusers", "transformers", "numpy")


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation needs, checked and fit for each other.

    Args:
        place: the folder for figures and pictures.
        metrics: what is measured, of `command_config.METRICS`.
        train: the images that the model was trained on.
        unseen: images that it was not trained on, where there are any.
        extractor: for the figures that need one.
        call_options: how samples are made.
        class_labels: of the samples, used in turn; None for an unconditional network.
    """

    pipeline: DDPMPipelineCustom
    place: Path
    config: EvaluateConfig
    metrics: Sequence[str]
    train: RealImages
    unseen: RealImages | None
    extractor: Extractor | None
    call_options: dict[str, Any]
    class_labels: list[int] | None
    figures: MetricsFile

    def run(self) -> None:
        """Measure what is not there yet. All processes must call it."""
        if "bpd" in self.metrics:
            measure_likelihood(self)
        if set(self.metrics) - {"bpd"}:
            samples = make_samples(self)
            if "nearest" in self.metrics:
                measure_nearness(self, samples)

    @property
    def kept(self) -> Path:
        """The folder of what a restart goes on with."""
        return self.place / "evaluation"

    def chain(self, **options: Any) -> dict[str, Any]:
        """A trajectory as figures depend on it."""
        said = describe_sampling(
            self.pipeline, self.config.seed, self.config.batch_size, self.class_labels, **options
        )
        return said | {"timesteps": options.get("timesteps") or self.pipeline.scheduler.config.timestep_spacing}

    def add(self, metric: str, value: float, settings: dict[str, Any], **more: Any) -> None:
        """Keep a figure, with the notes on the data that it is about."""
        self.figures.add({"metric": metric, "value": value, **more, "settings": settings})


def measure_likelihood(job: Evaluation) -> None:
    """Bits/dim of unseen images, or else of training images."""
    config, data = job.config, job.unseen or job.train
    count = config.num_likelihood_images
    chain = {"num_inference_steps": config.likelihood_steps, "timesteps": job.call_options["timesteps"]}
    settings = {
        "data": data.identity(),
        "chain": job.chain(**chain),
        "num_images": count,
        "calls_per_image": config.calls_per_image,
    }
    if job.figures.find("bpd", settings):
        return
    bits = resumable_bits_per_dim(
        job.pipeline,
        data.pixels,
        job.kept / f"likelihood-{_key(settings)}",
        num_images=count,
        seed=config.seed,
        batch_size=config.batch_size,
        class_labels=data.labels if job.class_labels else None,
        calls_per_image=config.calls_per_image,
        **chain,
    )
