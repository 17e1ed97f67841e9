"""The first bits of the stack: a few images in PNG or WebP, so that what the first latents borrow is no waste."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"optimize": True},
    "WEBP": {"lossless": True, "quality": 100, "method": 6, "exact": True},
}
MAX_WEBP_SIDE = 16_383


def write_opening(pixels: NDArray[np.uint8]) -> bytes:
    """Images (m, C, H, W), one below the other, in the smaller of PNG and lossless WebP."""
    count, channels, height, width = pixels.shape
    rows = pixels.transpose(0, 2, 3, 1).reshape(count * height, width, channels)
    image = Image.fromarray(rows[..., 0] if channels == 1 else rows)
    files = []
    for name, options in FORMATS.items():
        if name == "WEBP" and (max(image.size) > MAX_WEBP_SIDE or name not in _supported()):
            continue
        stream = io.BytesIO()
        image.save(stream, name, **options)
        files.append(stream.getvalue())
    return min(files, key=len)


def read_opening(content: bytes, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """The images that `write_opening` wrote.

    Raises:
        ValueError: if they are not of this shape, or damaged.
    """
    count, channels, height, width = shape
    try:
        with Image.open(io.BytesIO(content), formats=tuple(FORMATS)) as image:
            if image.size != (width, count * height):
                raise ValueError(f"{image.size[0]} × {image.size[1]} pixels")
            rows = np.array(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # on damaged files, Pillow's plugins raise nearly anything
        raise ValueError(f"its first images can't be read ({error})") from error
    return rows.reshape(count, height, width, channels).transpose(0, 3, 1, 2)


def to_words(content: bytes) -> NDArray[np.uint32]:
    """Bytes as words of a stack, which look random, as the bits of a draw must; the last one is 1."""
    padded = content + bytes(-len(content) % 4)
    words = np.frombuffer(_mixed(padded), "<u4").astype(np.uint32)
    return np.append(words, np.uint32(1))


def from_words(words: NDArray[np.uint32], length: int) -> bytes:
    """The `length` bytes that `to_words` got.

    Raises:
        ValueError: if it did not make these words.
    """
    content = _mixed(words[:-1].astype("<u4").tobytes())
    if len(words) != 1 + -(-length // 4) or words[-1] != 1 or any(content[length:]):
        raise ValueError("what is left of its bits after decoding is not what they began with")
    return content[:length]


def _mixed(content: bytes) -> bytes:
    key = hashlib.shake_128(b"ddpm-hf").digest(len(content))
    return (np.frombuffer(content, np.uint8) ^ np.frombuffer(key, np.uint8)).tobytes()


def _supported() -> set[str]:
    from PIL import features

    return {"PNG", *(["WEBP"] if features.check("webp") else [])}
