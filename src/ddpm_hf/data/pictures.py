"""Grids of images."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import Tensor

MIN_SIDE = 48  # smaller images are enlarged by integer factors, so that their pixels are visible


def check_plotting() -> None:
    """Import matplotlib, which plots need: now, since a run that has to end on time has none for it at its end.

    Raises:
        ValueError: where it is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")  # by its name: the app of a Space has this file, and no plots
    except ModuleNotFoundError as error:
        raise ValueError("the plots need matplotlib: pip install 'ddpm-hf[train]'.") from error


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """uint8 of shape (B, C, H, W) → PIL images."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def tile_side(side: int) -> int:
    """The width of an image of this width in a grid, enlarged and with its frame."""
    return side * max(1, math.ceil(MIN_SIDE / side)) + 2


def image_grid(images: Sequence[Image.Image]) -> Image.Image:
    """The images in reading order, in a grid as square as possible.

    Raises:
        ValueError: for no images.
    """
    if not images:
        raise ValueError("a grid needs at least one image.")
    width, height = images[0].size
    factor = max(1, math.ceil(MIN_SIDE / min(width, height)))
    tiles = [
        ImageOps.expand(
            i.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST), 1, "white"
        )
        for i in images
    ]
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    blank = Image.new("RGB", tiles[0].size, "white")
    return make_image_grid(tiles + [blank] * (rows * columns - len(tiles)), rows, columns)
