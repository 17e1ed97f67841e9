"""A network's predictions on noisy images of a data set, from which calibration and likelihood are computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

from ..data.pixels import check_pixels, normalize
from ..diffusion.ddpm_process import check_integer, to_device
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..diffusion.scheduling_ddpm_custom import ZERO_SNR_ERROR, DDPMSchedulerCustom
from ..distributed import lockstep_batches
from ..progress import progress
from ..sampling.generate import eval_mode

READ_EVERY = 16  # network calls, by which the CPU is ahead of a GPU at most
Key = TypeVar("Key")


class Prediction(NamedTuple):
    """One network call. Images are float32 of shape (B, C, H, W), on the network's device."""

    rows: Tensor  # (B,), positions of the images among the chosen ones
    column: int  # position of t among their timesteps
    t: Tensor  # (B,), on the CPU
    x_0: Tensor
    noise: Tensor  # ε
    x_t: Tensor
    output: Tensor  # of the network, with the channels of a learned variance


@dataclass
class NoisyImages:
    """Images of a data set, chosen and checked, for a network to predict from noisy versions of them.

    Args:
        pipe: its scheduler must be a `DDPMSchedulerCustom`.
        images: uint8 of shape (N, C, H, W).
        num_images: how many of them to use, drawn by `seed`; None takes all.
        seed: fixes the choice, and the noise: that of image i comes from seed + i.
        batch_size: images per network call and process.
        class_labels: for a class-conditional network: one label for all images, or N of them.
        min_images: the fewest that the results are meaningful for.
        chosen: the indices of the images to use, int64 (n,), instead of a choice by `num_images` and `seed`.

    Raises:
        ValueError: for any bad argument, before anything is computed.
    """

    pipe: DDPMPipelineCustom
    images: Tensor
    num_images: int | None = None
    seed: int = 0
    batch_size: int = 64
    class_labels: int | Sequence[int] | Tensor | None = None
    min_images: int = 2
    chosen: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pipe.scheduler, DDPMSchedulerCustom):
            name = type(self.pipe.scheduler).__name__
            raise ValueError(
                f"the pipeline's scheduler is a {name}, but must be a DDPMSchedulerCustom: set pipe.scheduler = "
                "DDPMSchedulerCustom.from_config(pipe.scheduler.config)."
            )
        scheduler = self.pipe.scheduler
        if scheduler.process.has_zero_terminal_snr and scheduler.config.prediction_type == "epsilon":
            raise ValueError(ZERO_SNR_ERROR)
        check_pixels(self.images)
        config = self.pipe.unet.config
        size = image_size(self.pipe.unet) if config.sample_size else self.images.shape[2:]
        expected = (config.in_channels, *size)
        if tuple(self.images.shape[1:]) != expected:
            raise ValueError(
                f"`images` have shape {tuple(self.images.shape[1:])} (C, H, W), but the network was made for {expected}"
                ": resize them, or pass those that it was trained on."
            )
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seed", self.seed, 0, 2**63 - 1 - len(self.images))
        count = len(self.images) if self.num_images is None else self.num_images
        check_integer("num_images", count, 1)
        if count > len(self.images):
            raise ValueError(
                f"`num_images` is {count}, but there are only {len(self.images)} images: pass more of them, or lower "
                "num_images."
            )
        self.indices = draw_indices(len(self.images), count, self.seed) if self.chosen is None else self.chosen
        if len(self.indices) < self.min_images:
            raise ValueError(
                f"`num_images` is {len(self.indices)}, but must be at least {self.min_images} for a meaningful "
                "standard error."
            )
        self._labels = None
        if config.num_class_embeds is not None or self.class_labels is not None:
            self._labels = self.pipe.prepare_class_labels(self.class_labels, len(self.images), guidance_scale=1.0)

    @torch.no_grad()
    def predictions(
        self, timesteps: Tensor, *, same_noise: bool, title: str, show_progress: bool
    ) -> Iterator[Prediction]:
        """Call the network on this process's share of the images: every n-th one under n processes.

        Args:
            timesteps: shape (K,), the same for all images, or (num_images, K).
            same_noise: an image has the same noise at all its timesteps, which makes tables over t smooth; or new noise
                at each, so that the errors of a sum over t are independent.
        """
        state, unet, process = PartialState(), self.pipe.unet, self.pipe.scheduler.process
        n = len(self.indices)
        batches = lockstep_batches(n, self.batch_size)
        is_shown = show_progress and state.is_main_process
        timesteps = timesteps.expand(n, -1)
        bar = progress(total=len(batches) * timesteps.shape[1], desc=title, unit="call", is_shown=is_shown)
        with bar, eval_mode(unet):
            for places in batches:
                batch, mine = places % n, int((places < n).sum())  # the last batch is padded
                x_0, labels = self._load(batch)
                generators = [torch.Generator().manual_seed(self.seed + int(i)) for i in self.indices[batch]]
                for column, t in enumerate(timesteps[batch].unbind(1)):
                    if column == 0 or not same_noise:
                        noise = torch.stack([torch.randn(x_0.shape[1:], generator=g) for g in generators])
                        noise = to_device(noise, x_0.device)
                    x_t = process.q_sample(x_0, t, noise)
                    at = to_device(t, x_t.device)
                    output = unet(x_t.to(unet.dtype), at, class_labels=labels, return_dict=False)[0]
                    if mine:
                        rows, *images = (part[:mine] for part in (batch, t, x_0, noise, x_t, output.float()))
                        yield Prediction(rows, column, *images)
                    bar.update()

    def _load(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """x_0 and labels of some images."""
        indices = self.indices[rows]
        x_0 = normalize(to_device(self.images[indices.to(self.images.device)], self.pipe.unet.device))
        return x_0, None if self._labels is None else self._labels[indices.to(self._labels.device)]


def on_cpu(measured: Iterable[tuple[Key, Tensor]]) -> Iterator[tuple[Key, Tensor]]:
    """Each key with its values, (…, B), as float64 on the CPU, which waits for a GPU once in READ_EVERY calls."""
    remaining = iter(measured)
    while waiting := list(islice(remaining, READ_EVERY)):
        keys, values = zip(*waiting, strict=True)
        table = torch.cat(values, dim=-1).cpu().double()
        yield from zip(keys, table.split([v.shape[-1] for v in values], dim=-1), strict=True)


def draw_indices(length: int, count: int, seed: int) -> Tensor:
    """Indices of `count` of `length` images, ascending. A larger draw with the same seed contains every smaller one."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order[:count].sort().values
