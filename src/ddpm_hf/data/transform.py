"""One image: whatever Pillow reads → an array of the mode, size and precision that the network takes."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..config.training import IMAGE_MODES

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}  # both antialiased
BYTE_MAX, WORD_MAX = 255, 65535


@dataclass(frozen=True)
class Transform:
    """What is done to every image. All fields are part of a cache's key.

    Args:
        resolution: the height and width of the result.
        mode: one of `IMAGE_MODES`.
        resize: one of `RESAMPLING`.
        crop_seed: None crops the center; a number, a random square that depends on it and the image's index alone.
        keep_16_bits: return uint16 instead of uint8.
        version: to be raised whenever the same file would give other pixels.
    """

    resolution: int
    mode: str
    resize: str = "bicubic"
    crop_seed: int | None = None
    keep_16_bits: bool = False
    version: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return IMAGE_MODES[self.mode], self.resolution, self.resolution

    @property
    def dtype(self) -> np.dtype:
        """uint8 or uint16."""
        return np.dtype(np.uint16 if self.keep_16_bits else np.uint8)


@dataclass(frozen=True)
class Unreadable:
    """An image that can't be decoded: its index in the source, its path there if it has one, and the reason."""

    index: int
    path: str | None
    reason: str

    def error(self, source: str) -> ValueError:
        """The exception to raise, which names the remedies."""
        place = f"{source}, {self.path}," if self.path else source
        return ValueError(
            f"image {self.index} (from 0) of {place} can't be read ({self.reason}): repair or remove it, or skip "
            "such images with --on_bad_image skip."
        )


def decode(index: int, raw: Any, transform: Transform) -> np.ndarray | Unreadable:
    """The array of one row of a source, or the reason why it can't be read.

    Args:
        index: its position in the source, which also seeds its random crop.
        raw: `{"bytes": …, "path": …}` as `datasets.Image(decode=False)` gives it, or a Pillow image.
        transform: what to do to it.

    Returns:
        `transform.dtype` of `transform.shape`.
    """
    path = raw.get("path") if isinstance(raw, dict) else None
    try:
        with _open(raw) as image:
            return prepare_image(image, transform, index)
    except UnidentifiedImageError:
        reason = "not an image in a format that Pillow reads"
    except Exception as error:  # on damaged files, Pillow's plugins raise nearly anything
        reason = str(error) or type(error).__name__
    return Unreadable(index, path, reason)


def image_format(raw: Any) -> tuple[int, int, str] | None:
    """Width, height and mode of the image in a row of a source; None if it can't be read."""
    try:
        with _open(raw) as image:
            return image.width, image.height, image.mode
    except Exception:  # as in `decode`, which gives the reason
        return None


def _open(raw: Any) -> Image.Image:
    if isinstance(raw, Image.Image):
        return raw
    if raw is None or (raw["bytes"] is None and raw["path"] is None):
        raise ValueError("the row holds no image")
    if raw["bytes"] is not None:
        return Image.open(BytesIO(raw["bytes"]))
    if Path(raw["path"]).exists():
        return Image.open(raw["path"])
    import datasets

    return datasets.Image().decode_example(raw)  # a file on the Hub, or in an archive


def prepare_image(image: Image.Image, transform: Transform, index: int = 0) -> np.ndarray:
    """Turn upright, convert, crop to a square and resize.

    Transparent parts become white where the mode has no alpha channel: their hidden colors are arbitrary, and graphics
    with transparency are mostly made for light pages.

    Returns:
        `transform.dtype` of `transform.shape`: 0 is black (or transparent), the type's maximum white (or opaque).

    Raises:
        ValueError: for integers beyond 16 bits and for floating-point values outside [0, 1], whose range is unknown.
    """
    image = ImageOps.exif_transpose(image)
    deep = image.mode == "F" or image.mode.startswith("I")
    image = _unit_plane(image) if deep else _convert(image, transform.mode)
    image = image.resize(
        (transform.resolution, transform.resolution),
        RESAMPLING[transform.resize],
        box=_crop_box(image.size, transform, index),
    )
    array = np.asarray(image)
    if deep:
        return _from_unit_plane(array, transform)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return array.astype(np.uint16) * (WORD_MAX // BYTE_MAX) if transform.keep_16_bits else np.ascontiguousarray(array)


def _crop_box(size: tuple[int, int], transform: Transform, index: int) -> tuple[int, int, int, int]:
    """The largest square: left, top, right and bottom."""
    side = min(size)
    spare = [length - side for length in size]
    if transform.crop_seed is None:
        left, top = (s // 2 for s in spare)
    else:
        rng = np.random.default_rng([transform.crop_seed, 1, index])
        left, top = (int(rng.integers(s + 1)) for s in spare)
    return left, top, left + side, top + side


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """Any mode of 8 bits per channel → L, LA, RGB or RGBA."""
    if image.mode == "LAB":  # which Pillow converts only by color profiles
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="RGB") or image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not mode.endswith("A"):
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def _unit_plane(image: Image.Image) -> Image.Image:
    """A plane of 16 or 32 bits per pixel → mode F in [0, 1]; Pillow's own conversions clip instead of scaling."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())  # NaN fails both comparisons below
    if image.mode == "F":
        limit = 1
    elif image.mode == "I" and high <= BYTE_MAX:  # 32 bits may hold values of either range
        limit = BYTE_MAX
    else:
        limit = WORD_MAX
    if not (low >= 0 and high <= limit):
        raise ValueError(
            f"its values (mode {image.mode}) lie in [{low:g}, {high:g}], but must lie in [0, {limit}]: rescale them"
        )
    return Image.fromarray((values / np.float32(limit)).astype(np.float32))


def _from_unit_plane(plane: np.ndarray, transform: Transform) -> np.ndarray:
    """(H, W) in [0, 1], give or take the overshoot of resizing → every color channel, and full opacity."""
    levels = np.iinfo(transform.dtype).max
    array = np.empty(transform.shape, transform.dtype)
    array[:] = (plane.astype(np.float64) * levels).round().clip(0, levels)
    if transform.mode.endswith("A"):
        array[-1] = levels
    return array
