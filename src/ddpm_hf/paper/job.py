"""What all figures share: the model, the images, the options, and one set of samples with the way they came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.commands import PaperConfig
from ..data.pixels import to_uint8
from ..diffusion.ddpm_process import DDPMProcess
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..evaluation.likelihood import BitsPerDim
from ..evaluation.likelihood_report import resumable_bits_per_dim
from ..evaluation.metrics.distances import Moments, moments
from ..evaluation.metrics.features import Extractor
from ..evaluation.metrics.patch_features import PatchFeatures
from ..evaluation.real_images import RealImages
from ..progress import progress
from ..sampling.generate import cycle_labels, eval_mode, index_batches
from ..storage.files import write_atomically

RECORDED = 10  # points of the reverse process that are kept of each sample


class Samples(NamedTuple):
    """Samples and the way that they came: S recorded steps of N images, uint8.

    Attributes:
        x_t: after each step, (S, N, C, H, W), clipped to [-1, 1]. The last are the samples.
        x_0: x̂_0 of each step, (S, N, C, H, W).
        timesteps: t of each step, descending.
    """

    x_t: Tensor
    x_0: Tensor
    timesteps: list[int]

    @property
    def images(self) -> Tensor:
        """The finished samples, (N, C, H, W)."""
        return self.x_t[-1]


@dataclass(frozen=True)
class Job:
    """A report in the making.

    Args:
        pipeline: its scheduler is ours.
        config: the options.
        weights: the hash of the weights.
        train: the images that the model was trained on, if given.
        unseen: images that it has not seen, if given.
        extractor: of features, if one is named.
        work: the folder for partial results.
    """

    pipeline: DDPMPipelineCustom
    config: PaperConfig
    weights: str
    train: RealImages | None
    unseen: RealImages | None
    extractor: Extractor | None
    work: Path

    @property
    def process(self) -> DDPMProcess:
        """The model's process."""
        return self.pipeline.scheduler.process

    @property
    def T(self) -> int:
        """The number of diffusion steps."""
        return self.process.num_train_timesteps

    @property
    def steps(self) -> int:
        """K, the steps of the reverse chains."""
        return self.config.num_inference_steps or self.T

    def times(self, *shares: float) -> list[int]:
        """The timesteps at these shares of T, in this order."""
        return [max(round(share * self.T) - 1, 0) for share in shares]

    def settings(self, *options: str) -> dict[str, Any]:
        """All that a result depends on, in types of JSON."""
        scheduler = {k: v for k, v in self.pipeline.scheduler.config.items() if not k.startswith("_diffusers")}
        given = {
            "weights": self.weights,
            "scheduler": hashlib.sha256(json.dumps(scheduler, sort_keys=True, default=str).encode()).hexdigest()[:16],
            "seed": self.config.seed,
            "train": self.train and self.train.identity(),
            "unseen": self.unseen and self.unseen.identity(),
            **{name: getattr(self.config, name) for name in options},
        }
        return json.loads(json.dumps(given))

    def folder(self, name: str, *options: str) -> Path:
        """A folder for partial results of these settings."""
        settings = json.dumps(self.settings(*options), sort_keys=True)
        return self.work / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    # --- images ------------------------------------------------------------------------------------------------------

    @property
    def held_out(self) -> RealImages:
        """Real images that the model has not seen, or else its training images."""
        images = self.unseen or self.train
        if images is None:
            raise ValueError("this figure needs real images: pass --dataset or --train_data_dir.")
        return images

    def labels(self, count: int) -> list[int] | None:
        """The classes of samples, in turn; None for an unconditional network."""
        classes = self.pipeline.unet.config.num_class_embeds
        if classes is None:
            return None
        known = self.train.classes if self.train else None
        return cycle_labels(known or list(range(max(classes - 1, 1))), range(count))

    def pictures(self, count: int) -> tuple[Tensor, list[int] | None]:
        """Images to work on, uint8 (n, C, H, W), with their labels: real ones if there are any, or else samples."""
        if self.train is None:
            labels = self.labels(len(self.samples.images))
            return self.samples.images[:count], labels and labels[:count]
        order = torch.randperm(len(self.held_out.pixels), generator=torch.Generator().manual_seed(self.config.seed))[
            :count
        ]
        labels_of = self.held_out.labels
        conditional = self.pipeline.unet.config.num_class_embeds is not None
        return self.held_out.pixels[order], labels_of[order].tolist() if conditional and labels_of is not None else None

    @cached_property
    def samples(self) -> Samples:
        """The samples that figures share: those of an earlier run with the same settings, or new ones."""
        names = ("num_images", "num_inference_steps", "batch_size")
        folder, K = self.folder("samples", *names), self.steps
        batches = index_batches(self.config.num_images, self.config.batch_size)
        missing = sum(not (folder / f"{number}.npz").is_file() for number in range(len(batches)))
        parts = []
        with progress(total=missing * K, desc="Sampling", unit="step", is_shown=bool(missing)) as bar:
            for number, batch in enumerate(batches):
                file = folder / f"{number}.npz"
                if not file.is_file():
                    made = self._sample(batch, lambda: bar.update())
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomically(file, partial(np.savez, **made))  # type: ignore[arg-type]
                with np.load(file) as stored:
                    parts.append({name: torch.from_numpy(stored[name]) for name in stored.files})
        x_t, x_0 = (torch.cat([part[name] for part in parts], dim=1) for name in ("x_t", "x_0"))
        return Samples(x_t, x_0, parts[0]["timesteps"].tolist())

    def _sample(self, batch: range, advance: Callable[[], object]) -> dict[str, np.ndarray]:
        def on_step(pipe: object, i: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
            advance()
            return tensors

        self.pipeline.set_progress_bar_config(disable=True)
        labels = self.labels(self.config.num_images)
        with eval_mode(self.pipeline.unet):
            output: Any = self.pipeline(
                len(batch),
                [torch.Generator().manual_seed(self.config.seed + i) for i in batch],
                self.steps,
                "latent",
                class_labels=labels and labels[batch.start : batch.stop],
                callback_on_step_end=on_step,
                trajectory_every=max(self.steps // RECORDED, 1),
            )
        if not output.images.isfinite().all():
            raise ValueError("the samples hold NaN or infinity: the network is damaged. Load another checkpoint.")
        return {
            "x_t": to_uint8(output.trajectory).numpy(),
            "x_0": to_uint8(output.trajectory_x_0).numpy(),
            "timesteps": np.array(output.trajectory_timesteps),
        }

    def options(self, seed: int, count: int | None = None) -> dict[str, Any]:
        """Arguments for the functions of `restoration.edit`: K, and one generator or `count` of them."""
        self.pipeline.set_progress_bar_config(disable=True)
        one = torch.Generator().manual_seed(self.config.seed + seed)
        several = [torch.Generator().manual_seed(self.config.seed + seed + i) for i in range(count or 0)]
        return {"num_inference_steps": self.steps, "generator": several or one}

    # --- measurements ------------------------------------------------------------------------------------------------

    @cached_property
    def bits(self) -> BitsPerDim:
        """The bound on real images, by all T steps; parts of an interrupted run are reused."""
        data = self.held_out
        names = ("num_likelihood_images", "batch_size")
        conditional = self.pipeline.unet.config.num_class_embeds is not None
        return resumable_bits_per_dim(
            self.pipeline,
            data.pixels,
            self.folder("likelihood", *names),
            num_images=self.num_likelihood_images,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            class_labels=data.labels if conditional else None,
        )

    @property
    def num_likelihood_images(self) -> int:
        """How many images the bound is measured on."""
        return min(self.config.num_likelihood_images, len(self.held_out.pixels))

    @cached_property
    def features(self) -> Callable[[Tensor], Tensor]:
        """Uint8 images → features: of the named network, or of patches of the training images."""
        if self.extractor is not None:
            extractor = self.extractor
            return lambda images: extractor(images, self.config.batch_size, show_progress=False).pooled
        return PatchFeatures(self.held_out.pixels)

    @property
    def feature_name(self) -> str:
        """What the features are, for a reader."""
        return self.extractor.identity if self.extractor else "patch features learned from the real images"

    @cached_property
    def real_moments(self) -> Moments:
        """The moments of all real images' features."""
        return moments(self.features(self.held_out.pixels))


def small(job: Job) -> tuple[int, ...]:
    """(C, H, W) of the model's images."""
    return (job.pipeline.unet.config.in_channels, *image_size(job.pipeline.unet))
