"""Many images from a model, by any number of processes: image i depends on seed + i.

Images are sampled in batches. Batch b holds images [bB, (b + 1)B), whichever process samples it, and when. So the bits
of an image depend only on the model, the options, the seed, the batch size B, the kind of device, and on whether a fast
network is compiled. The last, and the batch size, change the rounding of the network: in float32 nearly every pixel
stays the same, in half precision many change by a level or more.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from ..data.pixels import to_uint8
from ..diffusion.ddpm_labels import find_label, label_names
from ..diffusion.ddpm_process import check_integer
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..distributed import gather_lockstep, lockstep_batches
from ..progress import progress
from ..storage.weights import hash_weights
from .philox import PhiloxGenerator


def index_batches(num_images: int, batch_size: int) -> list[range]:
    """The images of each batch. Raises a ValueError for numbers below 1."""
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
    """Sample the images of this process: of n processes, each samples every n-th batch.

    Args:
        num_images: N, of all processes together.
        seed: image i comes from a generator seeded with seed + i.
        batch_size: B, images per network call and process; it may change the last bits of an image.
        class_labels: for a class-conditional network, used in turn: image i gets label i modulo their number.
        skip: batches to leave out, the same in all processes.
        show_progress: a bar on the main process, over its own share.
        call_options: passed to the pipeline (`num_inference_steps`, `eta`, `guidance_scale`, …); `rng="philox"` draws
            the noise by Philox4x32-10 instead of PyTorch's generator.

    Returns:
        An iterator over (indices of the images, their pixels: uint8 of shape (B, C, H, W) on the CPU).

    Raises:
        ValueError: immediately, before any network call, for a bad argument; later, for images that hold NaN.
    """
    batches = index_batches(num_images, batch_size)
    check_integer("seed", seed, 0, 2**63 - num_images)
    steps = len(check_options(pipeline, class_labels, **call_options))
    state = PartialState()
    remaining = [batch for number, batch in enumerate(batches) if number not in skip]
    share = remaining[state.process_index :: state.num_processes]
    is_shown = bool(show_progress and share and state.is_main_process)
    bar = progress(total=steps * len(share), desc="Sampling", unit="step", is_shown=is_shown)

    def made() -> Iterator[tuple[range, Tensor]]:
        with bar:
            for batch in share:
                x_0 = _sample_batch(pipeline, batch, seed, class_labels, bar.update, call_options)
                if x_0.isnan().any():
                    raise ValueError(
                        f"image {batch[int(x_0.isnan().flatten(1).any(1).nonzero()[0])]} holds NaN: the network, in "
                        f"{pipeline.sampling_dtype}, overflows or is damaged. Use bfloat16 instead of float16, or "
                        "float32."
                    )
                yield batch, to_uint8(x_0).cpu()

    return made()


def sample_in_lockstep(
    pipeline: DDPMPipelineCustom,
    num_images: int,
    seed: int,
    batch_size: int,
    *,
    class_labels: Sequence[int] | None = None,
    show_progress: bool = False,
    on_step: Callable[[], object] = lambda: None,
    **call_options: Any,
) -> Tensor:
    """Sample all images with equal numbers of network calls in all processes, as networks with sharded weights need.

    All processes must call it, and all get all images. Unlike in `sample_pixels`, the last bits of an image may depend
    on the number of processes.

    Args:
        num_images: N, of all processes together.
        seed: image i comes from a generator seeded with seed + i.
        batch_size: B, images per network call and process.
        class_labels: used in turn.
        on_step: called after every denoising step, equally often in all processes. It may raise.
        call_options: passed to the pipeline.

    Returns:
        uint8 of shape (N, C, H, W), on the network's device.

    Raises:
        ValueError: for a bad argument.
    """
    unet, batches = pipeline.unet, lockstep_batches(num_images, batch_size)
    steps = len(check_options(pipeline, class_labels, **call_options))
    is_shown = show_progress and PartialState().is_main_process
    bar = progress(total=steps * len(batches), desc="Sampling", unit="step", leave=False, is_shown=is_shown)

    def advance() -> None:
        bar.update()
        on_step()

    with bar, eval_mode(unet):
        made = [
            to_uint8(_sample_batch(pipeline, (batch % num_images).tolist(), seed, class_labels, advance, call_options))
            for batch in batches
        ]
    return gather_lockstep(torch.cat(made), num_images)


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Within this context the network is in evaluation mode: dropout is off."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def _sample_batch(
    pipeline: DDPMPipelineCustom,
    images: Sequence[int],
    seed: int,
    class_labels: Sequence[int] | None,
    on_step: Callable[[], object],
    call_options: dict[str, Any],
) -> Tensor:
    """x_0 of these images, float32 of shape (B, C, H, W), not clamped."""

    def advance(pipe: object, i: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    options = dict(call_options)
    is_philox = options.pop("rng", "torch") == "philox"
    return pipeline(
        len(images),
        [PhiloxGenerator(seed + i) if is_philox else torch.Generator().manual_seed(seed + i) for i in images],
        output_type="latent",
        return_dict=False,
        class_labels=cycle_labels(class_labels, images),
        callback_on_step_end=advance,
        **options,
    )[0]


def cycle_labels(class_labels: Sequence[int] | None, images: Sequence[int]) -> list[int] | None:
    """The label of each image, the labels being used in turn."""
    return [class_labels[i % len(class_labels)] for i in images] if class_labels else None


def parse_labels(labels: Sequence[object] | None, config: Mapping[str, Any]) -> list[int] | None:
    """The labels that are meant by names or numbers on a command line, or in a column of data.

    A text that is a name is that name. Other integers are labels themselves, unless the names are numbers that stand
    for other labels: of a model whose classes are called 1, 2 and 3, there is no class 0.

    Args:
        config: a network's configuration.

    Raises:
        ValueError: for an unknown name, listing those there are.
    """
    if labels is None:
        return None
    if config.get("num_class_embeds") is None:
        return [0 for _ in labels]  # of which `check_options` will complain
    names = label_names(config)
    are_numbers = all(name.isdecimal() for name in names)
    are_other_numbers = are_numbers and names != [str(i) for i in range(len(names))]

    def parse(text: str) -> int:
        is_label = re.fullmatch(r"-?[0-9]{1,18}", text) is not None
        return int(text) if is_label and text not in names and not are_other_numbers else find_label(text, config)

    return [parse(str(label)) for label in labels]


def check_options(
    pipeline: DDPMPipelineCustom,
    class_labels: Sequence[int] | None = None,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | Tensor | str | None = None,
    guidance_scale: float = 1.0,
    **call_options: Any,
) -> list[int]:
    """Check the options of a sampling, and return the timesteps that it follows. Changes nothing.

    Raises:
        ValueError: for bad timesteps, guidance or labels; every label is checked, not only those of the first batch.
    """
    pipeline.prepare_class_labels(class_labels or None, len(class_labels) if class_labels else 1, guidance_scale)
    image_size(pipeline.unet)  # raises unless it is known
    return pipeline.scheduler_on_trajectory(num_inference_steps, timesteps).timesteps.tolist()


def describe_sampling(
    pipeline: DDPMPipelineCustom,
    seed: int,
    batch_size: int,
    class_labels: Sequence[int] | None = None,
    weights: str | None = None,
    **call_options: Any,
) -> dict[str, Any]:
    """Everything that determines the bits of image i, for JSON: hashes of the weights and the calibration, timesteps,
    the other options of the call, the scheduler's configuration, the precision and the versions.

    Args:
        weights: the hash of the weights; by default of those of the network.
    """
    scheduler = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    is_calibrated = scheduler.get("variance_type") == "optimal"
    calibration = json.dumps(pipeline.scheduler.config["_calibration"], sort_keys=True) if is_calibrated else None
    timesteps = check_options(pipeline, class_labels, **call_options)
    return {
        "weights": weights or hash_weights(pipeline.unet),
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
