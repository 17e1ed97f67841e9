"""What JPEG, WebP and AVIF need for the same images: rates and PSNRs over their quality settings."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

QUALITIES = (2, 5, 10, 15, 20, 30, 40, 50, 60, 70, 80, 88, 94, 97)
OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"optimize": True, "subsampling": "4:2:0"},
    "WebP": {"method": 6},
    "AVIF": {"speed": 4},
}


class Rated(NamedTuple):
    """A code of the images at one setting.

    Attributes:
        files: bits per pixel of files, one an image.
        contents: of those, without headers: only what is coded of each image.
        sheet: bits per pixel of one file with all images side by side.
        psnr: of the files, in dB, of the average squared error.
        sheet_psnr: of the sheet.
    """

    files: float
    contents: float
    sheet: float
    psnr: float
    sheet_psnr: float


def rate_formats(pixels: NDArray[np.uint8]) -> dict[str, list[Rated]]:
    """Each format that this Pillow writes, at each quality, coarsest first.

    Args:
        pixels: (N, C, H, W), C of 1 or 3.
    """
    images = list(pixels.transpose(0, 2, 3, 1))
    return {
        name: [_rate(images, name, quality) for quality in QUALITIES]
        for name in OPTIONS
        if features.check(name.lower() if name != "JPEG" else "jpg")
    }


def rate_at(psnr: float, points: Sequence[tuple[float, float]]) -> float | None:
    """The rate at a PSNR, between points of (rate, PSNR) of a code; None outside of them."""
    envelope, best = [], -math.inf
    for rate, quality in sorted(points):
        if quality > best:
            envelope.append((rate, quality))
            best = quality
    if not envelope or not envelope[0][1] <= psnr <= envelope[-1][1]:
        return None
    rates, qualities = zip(*envelope, strict=True)
    return float(np.interp(psnr, qualities, rates))


def psnr_of(squared_error: float) -> float:
    """Peak signal-to-noise ratio of a squared error of pixels from 0 to 255, in dB."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-9))


def _rate(images: list[NDArray[np.uint8]], name: str, quality: int) -> Rated:
    coded = [_code(image, name, quality) for image in images]
    errors = [
        np.square(image.astype(float) - decoded).mean() for image, (_, decoded) in zip(images, coded, strict=True)
    ]
    columns = math.ceil(math.sqrt(len(images)))
    blank = np.zeros_like(images[0])
    rows = [
        np.concatenate([*images[i : i + columns], *[blank] * (columns - len(images[i : i + columns]))], axis=1)
        for i in range(0, len(images), columns)
    ]
    sheet = np.concatenate(rows)
    sheet_file, sheet_decoded = _code(sheet, name, quality)
    bits = 8 / (len(images) * images[0].shape[0] * images[0].shape[1])
    contents: Callable[[bytes], int] = {"JPEG": _jpeg_content, "WebP": _webp_content, "AVIF": _avif_content}[name]
    return Rated(
        bits * sum(len(file) for file, _ in coded),
        bits * sum(contents(file) for file, _ in coded),
        bits * len(sheet_file),
        psnr_of(float(np.mean(errors))),
        psnr_of(float(np.square(sheet.astype(float) - sheet_decoded).sum() * bits / 8 / sheet.shape[2])),
    )


def _code(pixels: NDArray[np.uint8], name: str, quality: int) -> tuple[bytes, NDArray[np.uint8]]:
    """A file, and its pixels (H, W, C)."""
    channels = pixels.shape[2]
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    stream = io.BytesIO()
    image.save(stream, name, quality=quality, **OPTIONS[name])
    with Image.open(stream) as decoded:
        back = np.array(decoded.convert("L" if channels == 1 else "RGB")).reshape(pixels.shape)
    return stream.getvalue(), back


def _jpeg_content(file: bytes) -> int:
    """The bytes between the header of the scan and the marker of the end."""
    place = 2
    while file[place + 1] != 0xDA:
        place += 2 + int.from_bytes(file[place + 2 : place + 4], "big")
    return len(file) - 2 - (place + 2 + int.from_bytes(file[place + 2 : place + 4], "big"))


def _webp_content(file: bytes) -> int:
    """All but the headers of RIFF, of the chunk, and of the frame (12 + 8 + 10 bytes)."""
    return len(file) - 30


def _avif_content(file: bytes) -> int:
    """The boxes `mdat`."""
    place, content = 0, 0
    while place < len(file):
        size = int.from_bytes(file[place : place + 4], "big") or len(file) - place
        content += size - 8 if file[place + 4 : place + 8] == b"mdat" else 0
        place += size
    return content
