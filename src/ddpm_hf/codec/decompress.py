"""The bytes of a file → images: every check before the network is relied on, and one of what came out."""

from __future__ import annotations

import warnings
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..diffusion.pipeline import DDPMPipelineCustom
from ..progress import progress
from .arithmetic import repeatable_arithmetic
from .compress import DATA, TRIES
from .container import join, read_header, unpack
from .header import MAX_BATCH_SIZE, hash_pixels, open_model, read_field
from .lossless import Model, decode_batch
from .lossy import decode_progressive
from .opening import from_words, read_opening
from .pictures import Picture, assemble, count_tiles, read_pictures, to_image
from .stack import BitStack, check_coder

DIFFERENT = (
    "the images that come out are not those that were compressed ({}): the network's arithmetic here differs from that "
    "of the machine that made the file, though not where it was tried. Decode it there, or with the same versions."
)


def decompress(pipeline: DDPMPipelineCustom, data: bytes) -> list[Image.Image]:
    """The images that `compress` got, bit by bit, or those of `compress_progressive`, as the intact part shows them.

    Where that part is not the whole file, a warning says so.

    Args:
        pipeline: the model that they were compressed with.
        data: the content of the file.

    Raises:
        ValueError: for a damaged file, for another model, and where this machine's arithmetic is not that of the file:
            no image comes out wrong.
    """
    if read_header(data)[0].get("codec") != "progressive":
        return [to_image(picture, pixels) for picture, pixels in decode(pipeline, data)]
    received = decode_progressive(pipeline, data)
    if received.problem is not None:
        warnings.warn(received.description, stacklevel=2)
    return [to_image(picture, pixels) for picture, pixels in received.images]


def decode(
    pipeline: DDPMPipelineCustom, data: bytes, show_progress: bool = False
) -> list[tuple[Picture, NDArray[np.uint8]]]:
    """As `decompress`: pixels, uint8 (C, H, W), and what the files said."""
    contents = unpack(data)
    header = contents.header
    read_field(header, "codec", lambda v: v == "lossless")
    channels, height, width = read_field(
        header,
        "shape",
        lambda v: isinstance(v, list) and len(v) == 3 and all(type(n) is int and 0 < n < 10**5 for n in v),
    )
    batches = read_field(
        header, "batches", lambda v: isinstance(v, list) and all(type(n) is int and 0 < n <= MAX_BATCH_SIZE for n in v)
    )
    checks = read_field(
        header, "checks", lambda v: isinstance(v, list) and len(v) == len(batches) and all(type(n) is int for n in v)
    )
    opening, length = read_field(
        header, "opening", lambda v: isinstance(v, list) and len(v) == 2 and all(type(n) is int and n > 0 for n in v)
    )
    try:
        pictures = read_pictures(header.get("images"), channels)
    except ValueError as error:
        raise ValueError(f"the file's header can't be read: {error}.") from error
    counts = [count_tiles(picture.size, (height, width)) for picture in pictures]
    payload = join(contents.sections, DATA)
    if opening + sum(batches) != sum(counts) or len(payload) % 4 or not payload.rstrip(b"\0"):
        raise ValueError("the file's header and its data don't belong together: no ddpm-hf wrote it.")

    words, shape = np.frombuffer(payload, "<u4"), (channels, height, width)
    check_coder(header.get("coder"))
    with repeatable_arithmetic(pipeline.unet):
        model = open_model(header, pipeline, batches)
        try:
            tiles = _pop_all(words, model, batches, checks, (opening, *shape), length, show_progress)
        except ValueError as error:
            raise ValueError(DIFFERENT.format(error)) from error
    places = np.cumsum([0, *counts])
    images = [
        (picture, assemble(tiles[start:end], picture.size))
        for picture, start, end in zip(pictures, places[:-1], places[1:], strict=True)
    ]
    if hash_pixels([pixels for _, pixels in images]) != header.get("sha256"):
        raise ValueError(DIFFERENT.format("the checksum of the images differs"))
    return images


def _pop_all(
    words: NDArray[np.uint32], model: Model, batches: list[int], checks: list[int], first: tuple[int, int, int, int],
    length: int, show_progress: bool,
) -> NDArray[np.uint8]:  # fmt: skip
    """All images, (N, C, H, W): the last batch lies uppermost, and PNG or WebP of shape `first` at the bottom."""
    stack = BitStack(words)
    decoded = []
    bar = progress(total=sum(batches), desc="Decompressing", unit="image", is_shown=show_progress)
    with bar:
        for number, size in reversed(list(enumerate(batches))):
            stack, pixels = _pop_batch(stack, model, (size, *first[1:]), number, checks[number])
            decoded.append(pixels)
            bar.update(size)
    return np.concatenate([read_opening(from_words(stack.words, length), first), *reversed(decoded)])


def _pop_batch(
    stack: BitStack, model: Model, shape: tuple[int, ...], number: int, check: int
) -> tuple[BitStack, NDArray[np.uint8]]:
    """A batch, and the stack below it; tried again where a sum came out otherwise.

    Raises:
        ValueError: if its checksum is never the stored one.
    """
    reason = "a checksum differs"
    for _ in range(TRIES):
        trial = stack.copy()
        try:
            pixels = decode_batch(trial, model, shape, number)
        except ValueError as error:
            reason = str(error)
            continue
        if zlib.crc32(pixels.tobytes()) == check:
            return trial, pixels
    raise ValueError(reason)
