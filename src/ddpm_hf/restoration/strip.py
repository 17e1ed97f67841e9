"""Images between two photographs: a strip, and an animation that goes there and back."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.restoration import InterpolateConfig
from ..data.pictures import MIN_SIDE, to_pil
from ..data.pixels import to_uint8
from ..diffusion.ddpm_process import check_integer
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..sampling.generate import describe_sampling, parse_labels
from ..storage.files import check_writable, lock_output_dir, write_atomically
from .edit import interpolate
from .photos import Photo, check_same, photo_channels, read_photo, resize, save_photo

FRAME_MS = 100


def interpolate_photos(
    pipeline: DDPMPipelineCustom, a: Path, b: Path, config: InterpolateConfig, show_progress: bool = True
) -> Path:
    """Write `<a>-<b>.gif` and `<a>-<b>.png` into `config.output_dir`, unless they are there; returns the latter.

    The largest part of each photograph that has the shape of the network's images is resized to them, as in training.

    Raises:
        ValueError: before the first network call, for photographs that can't be read, a timestep that the model does
            not have, or files of that name of another origin.
    """
    output_dir, size = Path(config.output_dir), image_size(pipeline.unet)
    check_writable(output_dir)
    channels, images = photo_channels(pipeline.unet.config.in_channels), []
    for file in (a, b):
        try:
            images.append(_network_image(read_photo(file, channels), size))
        except ValueError as error:
            raise ValueError(f"{str(file)!r} can't be used: {error}.") from error
    labels = None if config.class_label is None else parse_labels([config.class_label], pipeline.unet.config)
    if config.timestep is not None:
        check_integer("timestep", config.timestep, 0, pipeline.scheduler.config.num_train_timesteps - 1)
    call: dict[str, Any] = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    record = {
        "command": "interpolate", "num_images": config.num_images, "timestep": config.timestep,
        **describe_sampling(pipeline, config.seed, 1, labels, timesteps="linspace", **call),
        "photos": [hashlib.sha256(to_uint8(image).numpy().tobytes()).hexdigest() for image in images],
    }  # fmt: skip
    strip = output_dir / f"{a.stem}-{b.stem}.png"
    if strip.exists():
        check_same(strip, record)
        return strip
    weights = [i / (config.num_images - 1) for i in range(config.num_images)]
    pipeline.set_progress_bar_config(desc="Interpolating", disable=not show_progress)
    with lock_output_dir(output_dir):
        made: Any = interpolate(
            pipeline, images[0], images[1], weights, config.timestep,
            generator=torch.Generator().manual_seed(config.seed), class_labels=labels and labels[0], **call,
        ).images  # fmt: skip
        factor = max(1, math.ceil(MIN_SIDE / min(size)))
        pixels = to_uint8(2 * made.float().cpu() - 1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        frames = to_pil(pixels)
        others = [*frames[1:], *frames[-2:0:-1]]
        save_gif = partial(frames[0].save, format="GIF", save_all=True, append_images=others, duration=FRAME_MS, loop=0)
        write_atomically(strip.with_suffix(".gif"), save_gif)
        row = torch.cat(list(pixels), 2)
        save_photo(strip, row, Photo(row), record)
    return strip


def _network_image(photo: Photo, size: tuple[int, int]) -> Tensor:
    """The middle of a photograph, as large as the network's shape allows, at its size: (1, C, H, W) in [0, 1]."""
    scale = min(side / wanted for side, wanted in zip(photo.size, size, strict=True))
    height, width = (min(side, round(wanted * scale)) for side, wanted in zip(photo.size, size, strict=True))
    top, left = (photo.size[0] - height) // 2, (photo.size[1] - width) // 2
    return resize(photo.image[0, :, top : top + height, left : left + width], size).clamp(0, 1)[None]
