"""The phases of an evaluation. Each measures what is not there yet, and keeps it at once; all processes run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from ..config.commands import EvaluateConfig
from ..diffusion.pipeline import DDPMPipelineCustom
from ..sampling.folder import sample_to_folder
from ..sampling.generate import describe_sampling
from .likelihood_report import likelihood_details, rate_distortion_table, resumable_bits_per_dim, save_likelihood
from .metrics.features import Extractor, Features
from .metrics.measure import Measurement, measure
from .metrics.memorization import memorization, nearest_neighbours
from .metrics.reference_statistics import Reference, reference_statistics
from .plots import save_neighbours
from .predictions import draw_indices
from .real_images import RealImages
from .results import MetricsFile

NEIGHBOURS = 3  # beside each sample in the picture
MOST_HELD_OUT = 10_000  # real images whose distances to the training set are compared with those of samples


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation needs, checked and fit for each other.

    Args:
        place: the folder for figures and pictures.
        metrics: what is measured, of `command_config.METRICS`.
        train: the images that the model was trained on.
        unseen: images that it was not trained on, where there are any.
        extractor: for the figures that need one.
        call_options: how samples are made: `timesteps`, `eta`, …
        class_labels: of the samples, used in turn; None for an unconditional network.
        figures: those that are there already, and where new ones go.
        ema: whether the weights are an average, as far as is known.
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
    ema: bool | None

    @property
    def kept(self) -> Path:
        """The folder of what a restart goes on with."""
        return self.place / "evaluation"

    @property
    def num_likelihood_images(self) -> int:
        """How many images the likelihood is measured on."""
        return min(self.config.num_likelihood_images, len((self.unseen or self.train).pixels))

    def chain(self, **options: Any) -> dict[str, Any]:
        """A trajectory, and the model that follows it: all that figures depend on."""
        said = describe_sampling(self.pipeline, self.config.seed, self.config.batch_size, self.class_labels, **options)
        spacing = options.get("timesteps") or self.pipeline.scheduler.config.timestep_spacing
        # A name and a hash say as much as a thousand numbers. The weights are the stored ones, not what a cast made.
        short = {"timesteps": spacing, "timesteps_hash": _hash(said["timesteps"]), "weights": self.figures.weights}
        return said | short

    def lacks(self, metric: str, settings: dict[str, Any]) -> bool:
        """Whether a figure is still to be measured. All processes must ask, and go by what the main one finds."""
        return broadcast_object_list([self.figures.find(metric, settings) is None])[0]

    def keep(self, figure: dict[str, Any]) -> None:
        """Add a figure to those that are there; the main process does."""
        if PartialState().is_main_process:
            self.figures.add(figure | {"ema": self.ema})

    def folder(self, name: str, settings: dict[str, Any]) -> Path:
        """Where a restart finds what was made with these settings."""
        return self.kept / f"{name}-{_hash(settings)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Samples:
    """Samples, uint8 (N, C, H, W), and their features where they are asked for."""

    pixels: Tensor
    extractor: Extractor | None
    batch_size: int

    @cached_property
    def features(self) -> Features:
        """What the extractor says of them; all processes must ask."""
        assert self.extractor is not None
        return self.extractor(self.pixels, self.batch_size)


def measure_likelihood(job: Evaluation) -> None:
    """Bits/dim of unseen images, or else of training images."""
    config, data = job.config, job.unseen or job.train
    options = {"num_inference_steps": config.likelihood_steps, "timesteps": job.call_options["timesteps"]}
    settings = {
        "data": data.identity(),
        "chain": job.chain(**options),
        "num_images": job.num_likelihood_images,
        "calls_per_image": config.calls_per_image,
    }
    if not job.lacks("bpd", settings):
        return
    bits = resumable_bits_per_dim(
        job.pipeline,
        data.pixels,
        job.folder("likelihood", settings),
        num_images=job.num_likelihood_images,
        seed=config.seed,
        batch_size=config.batch_size,
        class_labels=data.labels if job.class_labels else None,
        calls_per_image=config.calls_per_image,
        **options,
    )
    if PartialState().is_main_process:
        save_likelihood(bits, job.place)
        tqdm.write(rate_distortion_table(bits))
    job.keep(
        {
            "metric": "bpd",
            "value": bits.total,
            "standard_error": bits.standard_error,
            "num_images": bits.num_images,
            "details": likelihood_details(bits),
            "warnings": data.notes + ([] if job.unseen else ["of images that the model was trained on"]),
            "settings": settings,
        }
    )


def make_samples(job: Evaluation) -> Samples:
    """The samples: made now, or found where an earlier run has left them."""
    config, options = job.config, {"class_labels": job.class_labels, **job.call_options}
    folder = job.folder("samples", describe_sampling(job.pipeline, config.seed, config.batch_size, **options))
    pixels = _stored_samples(folder)
    if len(pixels) < config.num_images:
        sample_to_folder(
            job.pipeline, folder, config.num_images, config.seed, config.batch_size, format="npz", **options
        )
        pixels = _stored_samples(folder)
    return Samples(pixels[: config.num_images], job.extractor, config.batch_size)


def _stored_samples(folder: Path) -> Tensor:
    file = folder / "samples.npz"
    if not file.is_file():
        return torch.empty(0)
    with np.load(file) as stored:
        return torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2).contiguous()


def measure_quality(job: Evaluation, samples: Samples) -> None:
    """FID, KID and their like, against the training set and, where there are any, against unseen images."""
    assert job.extractor is not None
    for data in filter(None, (job.train, job.unseen)):
        settings = {
            "data": data.identity(),
            "chain": job.chain(**job.call_options),
            "num_images": job.config.num_images,
            "extractor": job.extractor.identity,
        }
        names = [name for name in job.metrics if name not in ("bpd", "nearest")]
        if data is job.unseen and "isc" in names:  # which compares with nothing
            names.remove("isc")
        missing = [name for name in names if job.lacks("recall" if name == "prc" else name, settings)]
        if not missing:
            continue
        features, reference = samples.features, real_features(job, data)
        for name in missing if PartialState().is_main_process else ():
            for measurement in measure([name], features, reference, job.extractor):
                job.keep(_figure(measurement, data, settings))


def _figure(measurement: Measurement, data: RealImages, settings: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in asdict(measurement).items() if value is not None}
    del known["extractor"]  # which is in the settings
    metric, value, warnings = (known.pop(name) for name in ("name", "value", "warnings"))
    return {"metric": metric, "value": value, **known, "warnings": [*warnings, *data.notes], "settings": settings}


def real_features(job: Evaluation, data: RealImages) -> Reference:
    """The features of real images, from the cache where they are there."""
    assert job.extractor is not None
    return reference_statistics(
        data.pixels,
        job.extractor,
        dataset=data.name,
        split=data.split,
        resize=data.preparation["resize"],
        cache_dir=Path(job.config.cache_dir) if job.config.cache_dir else None,
        batch_size=job.config.batch_size,
    )


def all_real_features(job: Evaluation, data: RealImages) -> Tensor:
    """The features of all real images, (M, D): statistics keep a part of large sets."""
    assert job.extractor is not None
    kept = real_features(job, data).features
    return kept if len(kept) == len(data.pixels) else job.extractor(data.pixels, job.config.batch_size).pooled


def measure_memorization(job: Evaluation, samples: Samples) -> None:
    """Whether samples lie nearer to training images than unseen images do: in pixels and in features, with pictures."""
    real = job.unseen or job.train
    chosen = draw_indices(len(real.pixels), min(len(real.pixels), MOST_HELD_OUT), job.config.seed)
    settings: dict[str, Any] = {
        "data": job.train.identity(),
        "held_out": real.identity() | {"used": len(chosen)},
        "chain": job.chain(**job.call_options),
        "num_images": job.config.num_images,
    }
    own = None if job.unseen else chosen
    if job.lacks("nearest", settings):
        points = samples.pixels, job.train.pixels, real.pixels[chosen]
        compare(job, samples.pixels, points, own, settings, "nearest.png")
    if job.extractor is None:
        return
    settings = settings | {"extractor": job.extractor.identity}
    if job.lacks("nearest", settings):
        train = all_real_features(job, job.train)
        held_out = (all_real_features(job, job.unseen) if job.unseen else train)[chosen]
        points = samples.features.pooled, train, held_out
        compare(job, samples.pixels, points, own, settings, "nearest_features.png")


def compare(
    job: Evaluation,
    samples: Tensor,
    points: tuple[Tensor, Tensor, Tensor],
    own: Tensor | None,
    settings: dict[str, Any],
    picture: str,
) -> None:
    """One figure of `measure_memorization`, and its picture.

    Args:
        samples: uint8 (N, C, H, W), for the picture.
        points: what distances are between: those of the samples, of the training images, and of the held-out ones.
        own: which training images the held-out ones are, if they are some.
    """
    queries, train, real = points
    found = nearest_neighbours(queries, train, NEIGHBOURS, title="Training images nearest to samples")
    held_out = nearest_neighbours(real, train, 1, own=own, title="… and to real images")
    distances = found.distances[:, 0]
    result = memorization(distances, held_out.distances[:, 0])
    warnings = list(dict.fromkeys(job.train.notes + (job.unseen or job.train).notes))
    if job.unseen is None:
        warnings.append("held-out images are training images, each compared with all the others")
    if result.threshold == 0:
        warnings.append(
            f"{result.expected:.0%} of the held-out images are copies of training images: the share is that of copies "
            f"among the samples, and {result.expected:.2g}, not 0.05, for new ones"
        )
    if PartialState().is_main_process:
        save_neighbours(samples, job.train.pixels, found.indices, distances, job.place / picture)
    job.keep(
        {
            "metric": "nearest",
            "value": result.share,
            "standard_error": result.standard_error,
            "num_images": len(samples),
            "num_reference": len(train),
            "details": {
                "threshold": result.threshold,
                "median": float(distances.median()),
                "median_of_held_out": float(held_out.distances.median()),
            },
            "warnings": warnings,
            "settings": settings,
        }
    )
