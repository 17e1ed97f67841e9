"""Images → the bytes of a file: `compress`, and the growth of its batches."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..data.pixels import check_pixels
from ..diffusion.ddpm_process import VarianceType, check_integer
from ..diffusion.pipeline import DDPMPipelineCustom
from ..progress import progress
from .arithmetic import repeatable_arithmetic
from .container import Section, pack
from .header import MAX_BATCH_SIZE, describe_model, hash_pixels, image_shape, make_model
from .lossless import Model, borrowed_bits, decode_batch, encode_batch
from .measuring import with_calibration
from .opening import to_words, write_opening
from .pictures import Picture, check_names, cut, describe_pictures, from_image, read_picture
from .report import Report, Watcher
from .stack import BitStack, StackTooShortError, coder_module, describe_coder

STEPS = 50  # by default: twice as many save less than 2 %
BINS_PER_STD = 4  # 2 to 8 cost the same; the fewer, the less is borrowed
DATA = b"DATA"
TRIES = 3
NOT_REPEATABLE = (
    "the network's outputs are not the same from call to call on this machine, so that nothing that was compressed "
    "could be decoded: use --device cpu, or another machine."
)
Images = Sequence[str | Path] | Sequence[Image.Image] | Tensor


class Compressed(NamedTuple):
    """A file, and what it came to."""

    data: bytes
    report: Report


@dataclass(frozen=True)
class Gathered:
    """Images, ready to be encoded.

    Args:
        pictures: what their files say.
        pixels: uint8 (N, C, H, W): the images, or the tiles of them, in order.
        digest: of the images.
    """

    pictures: list[Picture]
    pixels: NDArray[np.uint8]
    digest: str


def compress(
    pipeline: DDPMPipelineCustom,
    images: Images,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | Tensor | str | None = None,
    variance_type: VarianceType | None = None,
    class_label: int | str | None = None,
    tile: bool = False,
    batch_size: int = 64,
    model_name: str | None = None,
) -> bytes:
    """Compress images without loss: bits-back coding, at the rate of the model's variational bound.

    The first images pay for the bits that the first latents borrow: they are stored in PNG or WebP, or so are all, if
    there are only a few. Decoding needs the same network outputs, bit by bit: the same kind of processor and libraries.

    Args:
        pipeline: the model.
        images: files, images of Pillow, or uint8 (N, C, H, W). Of the model's size and mode.
        num_inference_steps: K, the network calls per image; by default 50, or T if that is less.
        timesteps: the trajectory itself, or the name of a spacing; by default `optimal`. A model without a
            calibration is measured on some of the images.
        variance_type: of the reverse process; by default a learned one, or `optimal`.
        class_label: of all images, for a class-conditional model.
        tile: cut images of other sizes into tiles of the model's.
        batch_size: images per network call, at most.
        model_name: by which `ddpm-hf decompress` will look for the model.

    Returns:
        The content of a file, for `decompress`.

    Raises:
        ValueError: before the network is called: for images that the model can't hold, and any bad argument.
    """
    gathered = gather(images, pipeline, tile)
    return encode(
        pipeline, gathered, num_inference_steps=num_inference_steps, timesteps=timesteps, variance_type=variance_type,
        class_label=class_label, batch_size=batch_size, model_name=model_name,
    ).data  # fmt: skip


def gather(images: Images, pipeline: DDPMPipelineCustom, tile: bool = False) -> Gathered:
    """Read images, and check that the model can hold them.

    Raises:
        ValueError: names the image, what it has, what is needed, and what to do.
    """
    channels, height, width = image_shape(pipeline)
    if isinstance(images, Tensor):
        check_pixels(images)
        names = [f"{i:05}.png" for i in range(len(images))]
        read = [
            (Picture(name, "L" if channels == 1 else "RGB", (pixels.shape[2], pixels.shape[1])), pixels)
            for name, pixels in zip(names, images.cpu().numpy(), strict=True)
        ]
        if images.shape[1] != channels:
            raise ValueError(f"`images` have {images.shape[1]} channels, but the model has {channels}.")
    elif not len(images):
        raise ValueError("there are no images to compress: pass at least one.")
    elif isinstance(images[0], Image.Image):
        read = [
            from_image(image, f"{i:05}.png", channels, f"image {i}")  # type: ignore[arg-type]
            for i, image in enumerate(images)
        ]
    else:
        files = [Path(file) for file in images]  # type: ignore[arg-type]
        read = [read_picture(file, channels) for file in files]
        check_names(files, [picture for picture, _ in read])
    parts: list[NDArray[np.uint8]] = []
    for picture, pixels in read:
        if tile:
            parts += cut(pixels, (height, width))
        elif picture.size != (width, height):
            raise ValueError(
                f"{picture.name!r} has {picture.size[0]} × {picture.size[1]} pixels, but the model needs {width} × "
                f"{height}: resize it, or pass --tile to cut it into tiles of that size."
            )
        else:
            parts.append(pixels)
    return Gathered([picture for picture, _ in read], np.stack(parts), hash_pixels([pixels for _, pixels in read]))


def encode(
    pipeline: DDPMPipelineCustom,
    gathered: Gathered,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | Tensor | str | None = None,
    variance_type: VarianceType | None = None,
    class_label: int | str | None = None,
    batch_size: int = 64,
    bins_per_std: int = BINS_PER_STD,
    model_name: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
) -> Compressed:
    """As `compress`, with a report."""
    coder_module()
    check_integer("batch_size", batch_size, 1, MAX_BATCH_SIZE)
    T = pipeline.scheduler.config.num_train_timesteps
    if timesteps is None or isinstance(timesteps, str):
        num_inference_steps = min(STEPS, T) if num_inference_steps is None else num_inference_steps
    if timesteps is None:
        timesteps = "optimal"
    label = None
    if pipeline.unet.config.num_class_embeds is not None or class_label is not None:
        labels = pipeline.prepare_class_labels(class_label, 1, guidance_scale=1.0)
        label = None if labels is None else int(labels[0])
    start = time.perf_counter()
    pipeline = with_calibration(pipeline, gathered.pixels, label, show_progress)
    model = make_model(pipeline, num_inference_steps, timesteps, variance_type, bins_per_std, label)
    report = Report([level.t for level in model.levels], gathered.pixels[0].size)
    with repeatable_arithmetic(pipeline.unet):
        stack, batches, checks, opening = _fill_stack(model, gathered.pixels, batch_size, report, show_progress)
        described = describe_model(model, bins_per_std, batches, model_name, revision)
    header = {
        "codec": "lossless",
        **described,
        "coder": describe_coder(),
        "batches": batches,
        "checks": checks,
        "opening": [report.opening, len(opening)],
        "images": describe_pictures(gathered.pictures),
        "sha256": gathered.digest,
    }
    data = pack(header, [Section(DATA, stack.words.astype("<u4").tobytes())])
    report.seconds, report.network_seconds = time.perf_counter() - start, model.network_seconds
    report.payload_bits, report.opening_bits, report.file_bits = 32 * len(stack.words), 8 * len(opening), 8 * len(data)
    return Compressed(data, report)


def _fill_stack(
    model: Model, pixels: NDArray[np.uint8], batch_size: int, report: Report, show_progress: bool
) -> tuple[BitStack, list[int], list[int], bytes]:
    """Push all images: at first in PNG or WebP, then as many at once as the bits on the stack can pay for.

    Returns:
        The stack, the sizes of the batches, CRC-32 of their pixels, and the content that the stack began with.

    Raises:
        ValueError: if a batch does not come back, however often it is tried.
    """
    values = pixels[0].size
    needed = borrowed_bits(model.levels) * values
    count = 1
    while True:
        opening = write_opening(pixels[:count])
        if count < len(pixels) and 8 * len(opening) < needed:
            count += 1
            continue
        stack, start, per_image = BitStack(to_words(opening)), count, needed
        batches: list[int] = []
        checks: list[int] = []
        failures = 0
        report.begin(count)
        bar = progress(total=len(pixels), initial=count, desc="Compressing", unit="image", is_shown=show_progress)
        with bar:
            while start < len(pixels):
                size = _largest(min(batch_size, len(pixels) - start, int(stack.bits / per_image)), batch_size)
                trial, batch = stack.copy(), np.ascontiguousarray(pixels[start : start + size])
                watcher = Watcher(model, batch)
                try:
                    pushed = encode_batch(trial, model, batch, len(batches), watcher)
                except StackTooShortError:
                    per_image *= 1.5
                    if size > 1:
                        continue
                    break
                if not _comes_back(trial, stack, model, batch, len(batches)):
                    failures += 1
                    if failures > TRIES:
                        raise ValueError(NOT_REPEATABLE)
                    continue
                per_image = 1.05 * pushed.borrowed / size
                watcher.add_to(report, pushed.top)
                stack = trial
                batches.append(size)
                checks.append(zlib.crc32(batch.tobytes()))
                start += size
                bar.update(size)
        if start == len(pixels):
            return stack, batches, checks, opening
        needed, count = 1.2 * needed, count + 1  # a single image needed more: begin with more


def _comes_back(after: BitStack, before: BitStack, model: Model, batch: NDArray[np.uint8], number: int) -> bool:
    """Whether a batch can be decoded again, which leaves the stack as it was. Files are kept that were tried."""
    trial = after.copy()
    try:
        decoded = decode_batch(trial, model, batch.shape, number)
    except ValueError:
        return False
    return np.array_equal(decoded, batch) and np.array_equal(trial.words, before.words)


def _largest(count: int, batch_size: int) -> int:
    """The size of a batch of at most `count`: `batch_size`, or a power of two, so that there are few sizes."""
    return batch_size if count >= batch_size else 2 ** (max(count, 1).bit_length() - 1)
