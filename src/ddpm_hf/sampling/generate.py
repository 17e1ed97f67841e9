"""Many images from a model, by any number of processes: image i depends on seed + i.

The images are made in batches, and batch b holds images [bB, (b + 1)B) whoever makes it, now or after a restart. So
the bits of an image depend on the model, the options, the seed, the batch size B and the kind of device, and on nothing
else but whether a fast network is compiled. That, and the batch size, changes them by the rounding of the network: in
float32 nearly every pixel is the same, in half precision many differ by a level or more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from ..diffusion.ddpm_process import check_integer
from ..diffusion.pipeline import DDPMPipelineCustom, DDPMPipelineCustomOutput
from ..storage.weights import hash_weights


def image_batches(num_images: int, batch_size: int) -> list[range]:
    """Which images are in which batch. Raises a ValueError for numbers below 1."""
    check_integer("num_images", num_images, 1)
    check_integer("batch_size", batch_size, 1)
    return [range(i, min(i + batch_size, num_images)) for i in range(0, num_images, batch_size)]


def sample_pixels(
    pipeline: DDPMPipelineCustom,
    num_images: int,
    seed: int,
    batch_size: int,
    *,
    class_labels: Sequence[int] | None = None,
    skip: Container[int] = (),
    show_progress: bool = True,
    **call_options: Any,
) -> Iterator[tuple[range, Tensor]]:
    """Make this process's share of the images: of n processes, every one makes every n-th batch.

    Args:
        num_images: N, of all processes together.
        seed: image i comes from a generator seeded with seed + i.
        batch_size: B, images per network call and process; it may change the last bits of an image.
        class_labels: for a class-conditional network, used in turn: image i gets label i modulo their number.
        skip: numbers of batches that are not needed, the same in all processes.
        show_progress: a bar on the main process, over its own share.
        call_options: go to the pipeline's call (`num_inference_steps`, `eta`, `guidance_scale`, …).

    Returns:
        An iterator over (indices of the images, their pixels: uint8 of shape (B, C, H, W) on the CPU).

    Raises:
        ValueError: at once, before any network call, for any bad argument; later, for images that are not finite.
    """
    batches = image_batches(num_images, batch_size)
    check_integer("seed", seed, 0, 2**63 - num_images)
    steps = len(trajectory(pipeline, class_labels, **call_options))
    state = PartialState()
    remaining = [batch for number, batch in enumerate(batches) if number not in skip]
    share = remaining[state.process_index :: state.num_processes]
    is_quiet = not (show_progress and share and state.is_main_process)
    bar = tqdm(total=steps * len(share), desc="Sampling", unit="step", disable=is_quiet)
    return _sample_batches(pipeline, share, seed, class_labels, bar, call_options)


def _sample_batches(
    pipeline: DDPMPipelineCustom,
    batches: Sequence[range],
    seed: int,
    class_labels: Sequence[int] | None,
    bar: tqdm,
    call_options: dict[str, Any],
) -> Iterator[tuple[range, Tensor]]:
    def advance(pipe: object, i: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
        bar.update()
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    with bar:
        for batch in batches:
            output = pipeline(
                len(batch),
                [torch.Generator().manual_seed(seed + i) for i in batch],
                output_type="pt",
                class_labels=labels_in_turn(class_labels, batch),
                callback_on_step_end=advance,
                **call_options,
            )
            assert isinstance(output, DDPMPipelineCustomOutput)
            assert isinstance(output.images, Tensor)
            images = output.images
            if images.isnan().any():
                raise ValueError(
                    f"image {batch[int(images.isnan().flatten(1).any(1).nonzero()[0])]} holds NaN: the network, in "
                    f"{pipeline.sampling_dtype}, overflows or is damaged. Use bfloat16 instead of float16, or float32."
                )
            yield batch, (images * 255).round().to(torch.uint8).cpu()


def labels_in_turn(class_labels: Sequence[int] | None, images: range) -> list[int] | None:
    """The label of each of these images."""
    return [class_labels[i % len(class_labels)] for i in images] if class_labels else None


def trajectory(
    pipeline: DDPMPipelineCustom,
    class_labels: Sequence[int] | None = None,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | Tensor | str | None = None,
    guidance_scale: float = 1.0,
    **call_options: Any,
) -> list[int]:
    """The timesteps that a call with these options follows.

    Raises:
        ValueError: for bad timesteps, labels or guidance. All the labels: that of image 900 may be a mistake too.
    """
    pipeline.prepare_class_labels(class_labels or None, len(class_labels) if class_labels else 1, guidance_scale)
    pipeline.image_size()  # known, or told how to be
    pipeline.set_timesteps(num_inference_steps, timesteps)
    return pipeline.scheduler.timesteps.tolist()


def describe_sampling(
    pipeline: DDPMPipelineCustom,
    seed: int,
    batch_size: int,
    class_labels: Sequence[int] | None = None,
    **call_options: Any,
) -> dict[str, Any]:
    """All that decides the bits of image i, for JSON: hashes of the weights and the calibration, the timesteps, the
    other options of the call, the scheduler's configuration, the precision and the versions.
    """
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    is_calibrated = scheduler.get("variance_type") == "optimal"
    calibration = json.dumps(pipeline.scheduler.config["_calibration"], sort_keys=True) if is_calibrated else None
    timesteps = trajectory(pipeline, class_labels, **call_options)
    return {
        "weights": hash_weights(pipeline.unet),
        "seed": seed,
        "batch_size": batch_size,
        "class_labels": list(class_labels) if class_labels else None,
        "dtype": str(pipeline.sampling_dtype).removeprefix("torch."),
        "device": pipeline.device.type,
        **call_options,
        "num_inference_steps": len(timesteps),
        "timesteps": timesteps,
        "scheduler": type(pipeline.scheduler).__name__,
        **scheduler,
        "calibration": calibration and hashlib.sha256(calibration.encode()).hexdigest(),
        **{package: version(package) for package in ("ddpm-hf", "diffusers", "torch")},
    }
