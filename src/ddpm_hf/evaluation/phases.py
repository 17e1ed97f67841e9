"""The phases of an evaluation: each measures what is requested and missing, and stores it at once, on all processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ..config.commands import EvaluateConfig
from ..diffusion.pipeline import DDPMPipelineCustom
from ..sampling.folder import sample_to_folder
from ..sampling.generate import describe_sampling
from .likelihood_report import likelihood_details, resumable_bits_per_dim, save_likelihood
from .metrics.features import Extractor, Features
from .metrics.measure import measure
from .metrics.measurement import Measurement
from .metrics.memorization import memorization, nearest_neighbours
from .metrics.reference_statistics import Reference, reference_statistics
from .plots import save_neighbours
from .predictions import draw_indices
from .real_images import RealImages
from .results import RESULTS_FILE, Result, Settings, files_of, write_results

NEIGHBOURS = 3  # beside each sample in the picture
EXTRACTOR_FREE = ("bpd", "nearest")  # metrics; all others compare features
MAX_HELD_OUT = 10_000  # real images whose distances to the training set are compared with those of samples


@dataclass(frozen=True)
class Evaluation:
    """All that an evaluation needs, checked and consistent.

    Args:
        output_dir: the folder for results and plots.
        metrics: what to measure, of `config.commands.METRICS`.
        train: the images that the model was trained on.
        unseen: images that it was not trained on, if there are any.
        extractor: of features, if a metric needs one.
        class_labels: of the samples, used in turn; None for an unconditional network.
        weights: the hash of the weights as they are stored, before a cast to `config.dtype`.
        results: those of earlier runs with these weights; new ones are added. On the main process alone.
        ema: whether the weights are an average; None if unknown.
    """

    pipeline: DDPMPipelineCustom
    output_dir: Path
    config: EvaluateConfig
    metrics: Sequence[str]
    train: RealImages
    unseen: RealImages | None
    extractor: Extractor | None
    class_labels: list[int] | None
    weights: str
    results: list[Result]
    ema: bool | None

    @property
    def cache(self) -> Path:
        """The folder of samples and partial results, which a restart reuses."""
        return self.output_dir / "evaluation"

    @property
    def held_out(self) -> RealImages:
        """The images that stand for new ones: unseen ones, or else the training images."""
        return self.unseen or self.train

    @property
    def num_likelihood_images(self) -> int:
        """How many images the likelihood is measured on."""
        return min(self.config.num_likelihood_images, len(self.held_out.pixels))

    @cached_property
    def sampling(self) -> dict[str, Any]:
        """The chain that makes the samples, as `Settings.chain` has it."""
        return self.chain(**self.config.call_options())

    @cached_property
    def samples(self) -> Tensor:
        """Samples, uint8 (N, C, H, W): those of an earlier run, or new ones. All processes must ask for them."""
        config, folder = self.config, self.folder("samples", self.sampling)
        pixels = _stored_samples(folder)
        if len(pixels) < config.num_images:
            sample_to_folder(
                self.pipeline, folder, config.num_images, config.seed, config.batch_size,
                format="npz", class_labels=self.class_labels, **config.call_options(),
            )  # fmt: skip
            pixels = _stored_samples(folder)
        return pixels[: config.num_images]

    @cached_property
    def sample_features(self) -> Features:
        """What the extractor makes of the samples. All processes must ask for them."""
        if self.extractor is None:
            raise ValueError("this evaluation has no feature extractor: name one.")
        return self.extractor(self.samples, self.config.batch_size)

    def chain(self, **options: Any) -> dict[str, Any]:
        """A trajectory and the model that follows it, as `Settings.chain` has them."""
        config = self.config
        described = describe_sampling(
            self.pipeline, config.seed, config.batch_size, self.class_labels, weights=self.weights, **options
        )
        spacing = options["timesteps"] or self.pipeline.scheduler.config.timestep_spacing
        # A name and a hash stand for a thousand numbers.
        described |= {"timesteps": spacing, "timesteps_hash": _hash(described["timesteps"])}
        return json.loads(json.dumps(described))

    def is_missing(self, metric: str, settings: Settings) -> bool:
        """Whether a result is still to be measured, as the main process finds it. All processes must call it."""
        is_stored = any(r.metric == metric and r.settings == settings for r in self.results)
        return broadcast_object_list([not is_stored])[0]

    def add(self, measurement: Measurement, settings: Settings) -> None:
        """Store a result in `metrics.json`, in place of that in the same slot; on the main process."""
        if PartialState().is_main_process:
            result = Result(**vars(measurement), settings=settings, ema=self.ema)
            self.results[:] = [*(r for r in self.results if r.slot != result.slot), result]
            write_results(self.output_dir / RESULTS_FILE, self.results)

    def folder(self, name: str, settings: dict[str, Any]) -> Path:
        """The folder in the cache for what depends on these settings."""
        return self.cache / f"{name}-{_hash(settings)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _stored_samples(folder: Path) -> Tensor:
    file = folder / "samples.npz"
    if not file.is_file():
        return torch.empty(0)
    with np.load(file) as stored:
        return torch.from_numpy(stored["arr_0"]).permute(0, 3, 1, 2).contiguous()


# --- likelihood ----------------------------------------------------------------------------------------------------


def measure_likelihood(job: Evaluation) -> None:
    """Bits/dim of unseen images, or else of training images."""
    if "bpd" not in job.metrics:
        return
    config, data = job.config, job.held_out
    options = {"num_inference_steps": config.likelihood_steps, "timesteps": config.call_options()["timesteps"]}
    settings = Settings(
        data.identity(), job.chain(**options), job.num_likelihood_images, calls_per_image=config.calls_per_image
    )
    if not job.is_missing("bpd", settings):
        return
    bits = resumable_bits_per_dim(
        job.pipeline,
        data.pixels,
        job.folder("likelihood", asdict(settings)),
        num_images=job.num_likelihood_images,
        seed=config.seed,
        batch_size=config.batch_size,
        class_labels=data.labels if job.class_labels else None,
        calls_per_image=config.calls_per_image,
        **options,
    )
    if PartialState().is_main_process:
        save_likelihood(bits, job.output_dir)
    warnings = data.notes if job.unseen else (*data.notes, "of images that the model was trained on")
    found = Measurement(
        "bpd", bits.total, bits.num_images,
        standard_error=bits.standard_error, warnings=warnings, details=likelihood_details(bits),
    )  # fmt: skip
    job.add(found, settings)


# --- quality -------------------------------------------------------------------------------------------------------


def measure_quality(job: Evaluation) -> None:
    """FID, KID and their like, against the training images and, if there are any, against unseen ones."""
    extractor, metrics = job.extractor, [name for name in job.metrics if name not in EXTRACTOR_FREE]
    if extractor is None:
        return
    for data in filter(None, (job.train, job.unseen)):
        settings = Settings(data.identity(), job.sampling, job.config.num_images, extractor.identity)
        names = [name for name in metrics if name != "isc" or data is job.train]  # isc compares with no real images
        missing = [name for name in names if job.is_missing("recall" if name == "prc" else name, settings)]
        if not missing:
            continue
        features, reference = job.sample_features, _real_features(job, data, extractor)
        for name in missing if PartialState().is_main_process else ():
            for found in measure([name], features, reference, extractor):
                job.add(replace(found, warnings=found.warnings + data.notes), settings)


def _real_features(job: Evaluation, data: RealImages, extractor: Extractor) -> Reference:
    return reference_statistics(
        data.pixels,
        extractor,
        pixels_hash=data.pixels_hash,
        cache_dir=Path(job.config.cache_dir) if job.config.cache_dir else None,
        batch_size=job.config.batch_size,
    )


# --- memorization --------------------------------------------------------------------------------------------------


def measure_memorization(job: Evaluation) -> None:
    """Whether samples lie nearer to training images than new images do: in pixels and in features, with pictures."""
    if "nearest" not in job.metrics:
        return
    pixels = job.held_out.pixels
    chosen = draw_indices(len(pixels), min(len(pixels), MAX_HELD_OUT), job.config.seed)
    settings = Settings(
        job.train.identity(),
        job.sampling,
        job.config.num_images,
        held_out=job.held_out.identity() | {"used": len(chosen)},
    )
    if job.is_missing("nearest", settings):
        _compare(job, settings, (job.samples, job.train.pixels, pixels[chosen]), chosen)
    if job.extractor is None:
        return
    settings = replace(settings, extractor=job.extractor.identity)
    if job.is_missing("nearest", settings):
        train = _all_real_features(job, job.train, job.extractor)
        held_out = _all_real_features(job, job.unseen, job.extractor) if job.unseen else train
        _compare(job, settings, (job.sample_features.pooled, train, held_out[chosen]), chosen)


def _all_real_features(job: Evaluation, data: RealImages, extractor: Extractor) -> Tensor:
    """The features of all real images, (M, D), of which the reference of a large set holds only some."""
    stored = _real_features(job, data, extractor).features
    return stored if len(stored) == len(data.pixels) else extractor(data.pixels, job.config.batch_size).pooled


def _compare(job: Evaluation, settings: Settings, points: tuple[Tensor, Tensor, Tensor], chosen: Tensor) -> None:
    """One result of `measure_memorization`, and its picture.

    Args:
        points: what distances are between: the samples, the training images, and the held-out ones.
        chosen: the indices of the latter in their set.
    """
    queries, train, held_out = points
    exclude = None if job.unseen else chosen  # a training image is not its own neighbour
    found = nearest_neighbours(queries, train, NEIGHBOURS, title="Nearest training images of samples")
    expected = nearest_neighbours(held_out, train, 1, exclude=exclude, title="… and of real images")
    distances, expected_distances = found.distances[:, 0], expected.distances[:, 0]
    test = memorization(distances, expected_distances)
    warnings = list(dict.fromkeys(job.train.notes + job.held_out.notes))
    if job.unseen is None:
        warnings.append("held-out images are training images, each compared with all the others")
    if test.threshold == 0:
        warnings.append(
            f"{test.expected:.0%} of the held-out images are copies of training images: the value is the share of "
            f"copies among the samples, to be compared with {test.expected:.2g} instead of 0.05"
        )
    if PartialState().is_main_process:
        (picture,) = files_of("nearest", settings)
        save_neighbours(job.samples, job.train.pixels, found.indices, distances, job.output_dir / picture)
    details = {
        "threshold": test.threshold,
        "median": float(distances.median()),
        "median_of_held_out": float(expected_distances.median()),
    }
    result = Measurement(
        "nearest", test.share, len(queries), len(train),
        standard_error=test.standard_error, warnings=tuple(warnings), details=details,
    )  # fmt: skip
    job.add(result, settings)
