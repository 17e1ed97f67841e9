"""Sampling that can be watched: an iterator over the steps of one visitor's images."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from ..data.pixels import to_uint8
from ..diffusion.pipeline import DDPMPipelineCustom

FRAMES = 50  # of a trajectory that are kept


@dataclass(frozen=True)
class Frame:
    """The state after a step: x_t and x̂_0, uint8 (B, C, H, W) on the CPU."""

    number: int
    total: int
    timestep: int
    x_t: Tensor
    x_0: Tensor


def sample_live(
    pipeline: DDPMPipelineCustom, seed: int, count: int, scheduler: Any, **call_options: Any
) -> Iterator[list[Frame]]:
    """Sample images in a thread, and yield the frames that are new since the last look, at most `FRAMES` in all.

    Several may sample at once: each has a pipeline of its own, around the same network. When the iterator is closed,
    sampling ends. It does not wait for those who look.

    Args:
        seed: image i comes from a generator seeded with seed + i, as in `ddpm-hf sample`.
        scheduler: with the spacing and the variance that are wanted; it is not changed.
        call_options: of the pipeline's call.

    Raises:
        ValueError: for a bad option.
    """
    own = DDPMPipelineCustom(pipeline.unet, scheduler)
    own.set_progress_bar_config(disable=True)
    frames: SimpleQueue[Frame | BaseException | None] = SimpleQueue()  # None is the end
    is_closed = threading.Event()
    grid = own.scheduler_on_trajectory(call_options["num_inference_steps"], call_options.get("timesteps")).timesteps
    total, every = len(grid), ceil(len(grid) / FRAMES)

    def after_step(pipe: DDPMPipelineCustom, i: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if is_closed.is_set():
            pipe._interrupt = True
        elif i % every == 0 or i == total - 1:
            x_t, x_0 = (to_uint8(tensors[name]).cpu() for name in ("latents", "pred_original_sample"))
            frames.put(Frame(i + 1, total, int(t), x_t, x_0))
        return {}

    def work() -> None:
        try:
            own(
                count,
                [torch.Generator().manual_seed(seed + i) for i in range(count)],
                output_type="latent",
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
                **call_options,
            )
            frames.put(None)
        except BaseException as error:  # raised where somebody sees it
            frames.put(error)

    thread = threading.Thread(target=work, name="sample_live", daemon=True)
    thread.start()
    try:
        items: list[Frame | BaseException | None] = [frames.get()]
        while True:
            while not frames.empty():
                items.append(frames.get())
            new = [item for item in items if isinstance(item, Frame)]
            if new:
                yield new
            if isinstance(items[-1], BaseException):
                raise items[-1]
            if items[-1] is None:
                return
            items = [frames.get()]
    finally:
        is_closed.set()
        thread.join()
