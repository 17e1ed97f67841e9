"""Photographs and masks: files → tensors and back, upright, with transparency, EXIF and color profile kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..data.pictures import to_pil
from ..sampling.folder import changed_options
from ..storage.files import write_atomically

RECORD = "ddpm-hf"  # the key of a text in every PNG written here
KEPT = ("exif", "icc_profile")  # what a PNG holds beside its pixels


@dataclass(frozen=True)
class Photo:
    """A photograph, upright.

    Args:
        pixels: uint8 (C, H, W), with the channels of the network.
        alpha: uint8 (H, W), 255 for opaque; None where the file has no transparency.
        metadata: EXIF data, whose orientation is the normal one now, and the color profile.
    """

    pixels: Tensor
    alpha: Tensor | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        height, width = self.pixels.shape[1:]
        return height, width

    @property
    def image(self) -> Tensor:
        """Float32 (1, C, H, W) in [0, 1]."""
        return self.pixels[None].float() / 255


def photo_channels(channels: int) -> int:
    """The channels of a network.

    Raises:
        ValueError: if photographs have none such.
    """
    if channels not in (1, 3):
        raise ValueError(
            f"the model has {channels} channels, but photographs need one of 1 or 3: use `restore` and `edit` in "
            "Python, which take tensors."
        )
    return channels


def read_photo(file: Path, channels: int) -> Photo:
    """A photograph from a file in any format that Pillow reads.

    Args:
        channels: of the network, 1 or 3. Gray photographs get three equal ones.

    Raises:
        ValueError: with the reason, if it can't be read, or not without loss.
    """
    with _opened(file) as image:
        if image.mode == "F" or image.mode.startswith("I"):
            raise ValueError(f"it has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits")
        metadata = {key: image.info[key] for key in KEPT if image.info.get(key)}
        if image.mode not in ("L", "LA", "RGB", "RGBA", "P"):
            metadata.pop("icc_profile", None)  # it describes colors of another kind
        alpha = None
        if image.has_transparency_data:
            image = image.convert("RGBA")
            alpha = _tensor(image.getchannel("A"))
        pixels = _tensor(image.convert("RGB")).permute(2, 0, 1)
    if channels == 1:
        if not bool((pixels == pixels[:1]).all()):
            raise ValueError("it has colors, but the model makes gray images: convert it to gray")
        pixels = pixels[:1]
        if image.mode in ("RGB", "RGBA", "P"):
            metadata.pop("icc_profile", None)
    return Photo(pixels.contiguous(), alpha, metadata)


def gray_photo(file: Path) -> Photo:
    """As `read_photo`, of one channel: colors become their luma."""
    photo = read_photo(file, 3)
    luma = Image.fromarray(photo.pixels.permute(1, 2, 0).numpy()).convert("L")
    return Photo(_tensor(luma)[None], photo.alpha, photo.metadata)


def read_mask(file: Path) -> Tensor:
    """The part of a photograph that is to be painted: bool (H, W), from an image that is white there, black elsewhere.

    Raises:
        ValueError: with the reason, if it can't be read, has gray values, or is all black.
    """
    with _opened(file, f"its mask {str(file)!r}") as image:
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
        values = _tensor(image.convert("L"))
    gray = values[(values > 0) & (values < 255)]
    if len(gray):
        raise ValueError(
            f"its mask {str(file)!r} has gray values, such as {int(gray[0])}, but must be white (255) where the photo "
            "is to be painted and black (0) elsewhere: draw with a hard-edged pencil, or threshold it; save it as PNG"
        )
    if not values.any():
        raise ValueError(f"its mask {str(file)!r} is all black, but must be white where the photo is to be painted")
    return values > 0


def read_kernel(file: Path) -> Tensor:
    """The kernel of a blur: float64 (h, w), from a gray image of any depth.

    Raises:
        ValueError: with the reason, if it can't be read.
    """
    with _opened(file) as image:
        is_deep = image.mode == "F" or image.mode.startswith("I")
        return torch.from_numpy(np.array(image if is_deep else image.convert("L"), np.float64))


def save_photo(file: Path, pixels: Tensor, photo: Photo, record: dict[str, Any]) -> None:
    """Write a PNG, atomically, with the transparency and the metadata of a photograph.

    Args:
        pixels: uint8 (C, H, W); of another size, the transparency is resized to it.
        record: how the image was made, which `read_record` reads.
    """
    (image,) = to_pil(pixels[None])
    if photo.alpha is not None:
        alpha = Image.fromarray(photo.alpha.numpy())
        if alpha.size != image.size:
            alpha = alpha.resize(image.size, Image.Resampling.BICUBIC)
        image.putalpha(alpha)
    text = PngInfo()
    text.add_text(RECORD, json.dumps(record))
    write_atomically(file, partial(image.save, format="PNG", pnginfo=text, **photo.metadata))


def read_record(file: Path) -> dict[str, Any] | None:
    """How an image was made, from the text in its PNG; None where it has none."""
    try:
        with Image.open(file) as image:
            return json.loads(image.info[RECORD])
    except (OSError, SyntaxError, KeyError, TypeError, ValueError, RecursionError, Image.DecompressionBombError):
        return None


def check_same(output: Path, record: dict[str, Any]) -> None:
    """Raise a ValueError unless an existing image is the one that would be made."""
    earlier = read_record(output)
    if earlier is None:
        raise ValueError(f"{str(output)!r} exists, and was not made by ddpm-hf: choose another --output_dir.")
    changes = changed_options(earlier, record)
    if changes:
        raise ValueError(
            f"{str(output)!r} exists, and was made otherwise: {'; '.join(changes)}. Use the same photo and options, or "
            "choose another --output_dir."
        )


def resize(image: Tensor, size: tuple[int, int], filter: Image.Resampling = Image.Resampling.BICUBIC) -> Tensor:
    """Float32 (C, H, W) → (C, *size), by Pillow, without rounding."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    planes = [Image.fromarray(plane.numpy()).resize((size[1], size[0]), filter) for plane in image.float().cpu()]
    return torch.stack([_tensor(plane) for plane in planes])


@contextmanager
def _opened(file: Path, subject: str = "it") -> Iterator[Image.Image]:
    """The image in a file, upright, with all of its pixels read.

    Args:
        subject: what errors call it.

    Raises:
        ValueError: with the reason, if it can't be read.
    """
    try:
        with Image.open(file) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{subject} is not an image in a format that Pillow reads") from None
    except Exception as error:  # on damaged files, Pillow's plugins raise nearly anything
        raise ValueError(f"{subject} can't be read ({str(error) or type(error).__name__})") from error
    yield upright


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image))
