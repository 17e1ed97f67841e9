"""The pictures of a run's page, as PNGs: small enough for one file, made from the grids that the log keeps."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..data.pictures import image_grid, tile_side, to_pil
from .copies import Copies

SHOWN = 8  # samples in a row
ROWS = 10  # of earlier samples
SIDE = 96  # pixels of a sample in a row
GRID = 720  # and of a grid


def grid(pixels: Tensor) -> bytes:
    """Images, uint8 of shape (N, C, H, W), in a grid."""
    return _png(image_grid(to_pil(pixels)), GRID)


def history(folder: Path, resolution: int, latest: int) -> list[tuple[int, bytes]]:
    """Some samples of earlier times, read back from the grids in the folder of the log: the update, and a row.

    Args:
        latest: the update of the newest grid that belongs to this run.
    """
    files = {}
    for file in folder.glob("test_samples-*.png"):
        number = file.stem.rpartition("-")[2]
        if number.isdecimal() and int(number) <= latest:
            files[int(number)] = file
    steps = sorted(files)
    if len(steps) > ROWS:  # the first, the last, and some between
        steps = [steps[round(i * (len(steps) - 1) / (ROWS - 1))] for i in range(ROWS)]
    rows = []
    for step in steps:
        with Image.open(files[step]) as picture:
            rows.append((step, _png(_row(_tiles(picture.convert("RGB"), tile_side(resolution))), SHOWN * SIDE)))
    return rows


def nearest(samples: Tensor, copies: Copies, training_images: Tensor) -> bytes:
    """Samples above their nearest training images, those most like them first. All pixels are uint8 (N, C, H, W)."""
    order = copies.ratios.argsort()[:SHOWN]
    pairs = samples[order], training_images[copies.indices[order]]
    rows = [_row([image_grid([tile]) for tile in to_pil(pixels)]) for pixels in pairs]
    return _png(Image.fromarray(np.vstack([np.asarray(row) for row in rows])), SHOWN * SIDE)


def _tiles(picture: Image.Image, side: int) -> list[Image.Image]:
    places = [(x * side, y * side) for y in range(picture.height // side) for x in range(picture.width // side)]
    return [picture.crop((x, y, x + side, y + side)) for x, y in places[:SHOWN]]


def _row(tiles: list[Image.Image]) -> Image.Image:
    return Image.fromarray(np.hstack([np.asarray(tile) for tile in tiles]))


def _png(image: Image.Image, most: int) -> bytes:
    """A PNG that is at most as wide."""
    if image.width > most:
        image = image.resize((most, max(1, round(image.height * most / image.width))), Image.Resampling.BOX)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
