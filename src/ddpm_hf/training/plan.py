"""The plan of a run: its length, its learning rate, and what is due when. All counts are in optimizer updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from diffusers.optimization import get_scheduler

from ..storage.files import describe_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..config.training import TrainConfig

MAX_INFERENCE_BATCH = 64
MIN_CALIBRATION_IMAGES = 16
EVAL_CALLS = 8  # network calls for the bits/dim of one held-out image
EVAL_SAMPLING_STEPS = 10  # and for one sample to compare with it
KEPT_CHECKPOINTS = 2
CHECKPOINT_BYTES = 16  # per parameter: exported and raw weights, and Adam's two moments
PIPELINE_BYTES = 4
IMAGES_PER_EPOCH_OF_A_STREAM = 50_000  # for previews, which are due by epochs


def settle_checkpoint_limit(config: TrainConfig, progress: dict[str, Any]) -> TrainConfig:
    """The configuration with a number for `checkpoints_total_limit`.

    Args:
        progress: of the checkpoint to resume from, or empty. Where all were kept before, none of them is deleted.
    """
    if config.checkpoints_total_limit is not None:
        return config
    limit = progress["config"].get("checkpoints_total_limit") or 0 if progress else KEPT_CHECKPOINTS
    return replace(config, checkpoints_total_limit=limit)


@dataclass(frozen=True)
class Plan:
    """What follows from the options, the number of images (None for a stream) and the number of processes.

    A resumed run plans what is left after `steps_before` updates of `images_before` images: its batches may have had
    another size before.
    """

    config: TrainConfig
    num_images: int | None
    num_processes: int
    steps_before: int = 0
    images_before: int = 0

    def __post_init__(self) -> None:
        if self.num_images is None and self.config.max_train_steps is None:
            raise ValueError("the length of a stream is unknown: pass --max_train_steps instead of --num_epochs.")
        if self.num_images is not None and self.global_batch > self.num_images:
            raise ValueError(
                f"`train_batch_size` is {self.config.batch_size}, with accumulation and all processes "
                f"{self.global_batch} images per update, but there are only {self.num_images} images: lower it."
            )

    @property
    def global_batch(self) -> int:
        """Images per update, over all processes."""
        return self.config.batch_size * self.config.gradient_accumulation_steps * self.num_processes

    @property
    def inference_batch(self) -> int:
        """Images per network call and process without gradients, in previews and validation.

        Without gradients no activations are stored, so four times as many images fit as in training, and more.
        """
        return min(MAX_INFERENCE_BATCH, 4 * self.config.batch_size)

    @property
    def max_steps(self) -> int:
        """Updates of the whole run."""
        if self.config.max_train_steps is not None:
            return self.config.max_train_steps
        images_left = self.config.num_epochs * self._images - self.images_before
        return self.steps_before + math.ceil(images_left / self.global_batch)

    def describe(self, source: str, num_parameters: int, device: torch.device) -> str:
        """The run in a sentence."""
        count = f"{self.num_images:,}" if self.num_images else "a stream of"
        return (
            f"{source}: {count} images at {self.config.resolution}×{self.config.resolution}. A network of "
            f"{num_parameters:,} parameters, {self.max_steps:,} updates of {self.global_batch} images, on "
            f"{self.num_processes} × {device.type}."
        )

    @property
    def _images(self) -> int:
        return self.num_images or IMAGES_PER_EPOCH_OF_A_STREAM

    @cached_property
    def _factor(self) -> Callable[[int], float]:
        """The learning rate relative to its peak, as a function of the update: the lambda of diffusers' scheduler."""
        scheduler = get_scheduler(
            self.config.lr_scheduler,
            torch.optim.SGD([torch.zeros(1)], lr=self.config.learning_rate),
            num_warmup_steps=self.config.lr_warmup_steps,
            num_training_steps=self.max_steps,
        )
        return scheduler.lr_lambdas[0]

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step` (from 0), a function of the number of updates alone."""
        return self.config.learning_rate * self._factor(step)

    def calibration_images(self, updates: int) -> int:
        """How many images the finished model is calibrated on: by default, for a twentieth of the cost of the training.

        One update costs three network calls per image, the calibration T.

        Args:
            updates: of the training.
        """
        wanted = self.config.calibration_images
        if wanted is None:
            affordable = 3 * updates * self.global_batch // (20 * self.config.ddpm_num_steps)
            wanted = min(256, affordable) if affordable >= MIN_CALIBRATION_IMAGES else 0
        return min(wanted, self.num_images or wanted)

    def validation_due(self, done: int) -> bool:
        """Whether the exported weights are measured after update number `done`."""
        every = self.config.eval_steps
        return every is not None and (done % every == 0 or done == self.max_steps)

    def describe_validation(self) -> str:
        """The rhythm, the images and the relative cost, where an update costs three network calls per image."""
        images, every = self.config.eval_images, self.config.eval_steps
        if every is None:
            return "none (--eval_steps)"
        share = images * (EVAL_CALLS + EVAL_SAMPLING_STEPS) / (3 * self.global_batch * min(every, self.max_steps))
        place = f"the split {self.config.eval_split}" if self.config.eval_split else "the training set"
        return f"every {every:,} updates on {images} images held out of {place}, for {share:.1%} more network calls"

    def checkpoint_due(self, done: int) -> bool:
        """Whether a checkpoint follows update number `done` (from 1)."""
        return done % self.config.checkpointing_steps == 0 or done == self.max_steps

    def checkpoints_at_a_time(self, existing: int) -> int:
        """The most checkpoints that are on the disk at a time, where this run begins with `existing` ones.

        Beyond the limit there is the best one, and the new one before the oldest is deleted.
        """
        updates = range(self.steps_before + 1, self.max_steps + 1)
        new = (n for n in updates if self.checkpoint_due(n) or self.export_due(n) or self.validation_due(n))
        if not self.config.checkpoints_total_limit:
            return existing + sum(1 for _ in new)
        most = self.config.checkpoints_total_limit + 1 + (self.config.eval_steps is not None)
        return max(existing + 1, min(most, existing + len(list(islice(new, most)))))

    @property
    def kept_checkpoints(self) -> str:
        """Which checkpoints stay, in words."""
        limit, best = self.config.checkpoints_total_limit, " and the best" if self.config.eval_steps else ""
        return f"the newest {limit}{best}" if limit else "all"

    def describe_checkpoints(self, existing: int, num_parameters: int, free: int) -> str:
        """How many there will be, and their room on a disk that holds `existing` ones and has `free` bytes left."""
        count, size = self.checkpoints_at_a_time(existing), CHECKPOINT_BYTES * num_parameters
        each, together, left = (describe_bytes(number) for number in (size, count * size, free))
        return (
            f"Checkpoints: up to {count} of {each} at a time, {together} together; {left} are free. "
            f"Kept: {self.kept_checkpoints} (--checkpoints_total_limit)."
        )

    def disk_needed(self, existing: int, num_parameters: int) -> int:
        """Bytes that checkpoints and the exported pipeline will take beside `existing` checkpoints."""
        new = self.checkpoints_at_a_time(existing) - existing
        return (new * CHECKPOINT_BYTES + PIPELINE_BYTES) * num_parameters

    def preview_due(self, done: int) -> bool:
        """Whether sample grids follow update number `done`: early, then regularly. The end of a run has its own."""
        if done == self.max_steps:
            return False
        every = self.config.save_images_steps
        if every is not None:
            return every > 0 and (done == max(1, every // 10) or done % every == 0)
        return self._ends_epoch(done, self.config.save_images_epochs)

    def export_due(self, done: int) -> bool:
        """Whether the pipeline is written into the output folder after update number `done`."""
        return done == self.max_steps or self._ends_epoch(done, self.config.save_model_epochs)

    def _ends_epoch(self, done: int, every: int) -> bool:
        """Whether update `done` ends the first epoch, or one that is a multiple of `every` later."""
        images = [self.images_before + (n - self.steps_before) * self.global_batch for n in (done - 1, done)]
        before, after = (n // self._images for n in images)
        return any((epoch - 1) % every == 0 for epoch in range(before + 1, after + 1))
