"""Images larger than the network's: predictions of overlapping tiles, averaged at every step.

This is MultiDiffusion (arXiv 2302.08113, Eq. 5): every tile is predicted from its part of one x_t, and where tiles
overlap, their predictions are averaged, with weights that fall towards a tile's border, so that no seam shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERLAP = 4  # a quarter of a tile, at least
TILES_PER_CALL = 64


def predict_in_tiles(
    predict: Callable[[Tensor, Tensor | None], Tensor],
    x_t: Tensor,
    labels: Tensor | None,
    tile: tuple[int, int],
    where: Tensor | None = None,
) -> Tensor:
    """The prediction of a network for images of any size from its own upwards.

    Args:
        predict: f(x, labels), for x of shape (N, C, *tile).
        x_t: (B, C, H, W).
        labels: (B,) or None.
        tile: (h, w), the size of the network's images.
        where: bool (H, W), if only tiles that see such a pixel are wanted.

    Returns:
        (B, C', H, W), 0 where no tile is.
    """
    height, width = tile
    size = (x_t.shape[2], x_t.shape[3])
    if size == tile:
        return predict(x_t, labels)
    corners = tile_corners(size, tile, where)
    tiles = torch.cat([x_t[..., top : top + height, left : left + width] for top, left in corners])
    tile_labels = [None] * len(tiles) if labels is None else labels.repeat(len(corners)).split(TILES_PER_CALL)
    calls = zip(tiles.split(TILES_PER_CALL), tile_labels, strict=False)
    predictions = torch.cat([predict(part, part_labels) for part, part_labels in calls]).chunk(len(corners))
    weights = torch.outer(*(_tent(n, x_t) for n in tile))
    total = torch.zeros(len(x_t), predictions[0].shape[1], *x_t.shape[2:], dtype=x_t.dtype, device=x_t.device)
    weight = torch.zeros_like(total[:1, :1])
    for prediction, (top, left) in zip(predictions, corners, strict=True):
        total[..., top : top + height, left : left + width] += weights * prediction
        weight[..., top : top + height, left : left + width] += weights
    return total / weight.where(weight > 0, 1)


def tile_corners(size: tuple[int, int], tile: tuple[int, int], where: Tensor | None = None) -> list[tuple[int, int]]:
    """The tiles that cover an image of (H, W), or those that see a pixel where `where`, bool (H, W), is true."""
    height, width = tile
    return [
        (top, left)
        for top in tile_starts(size[0], height)
        for left in tile_starts(size[1], width)
        if where is None or bool(where[top : top + height, left : left + width].any())
    ]


def tiled(size: tuple[int, int], tile: tuple[int, int], where: Tensor) -> Tensor:
    """The pixels that the tiles of `where` see, bool (H, W)."""
    seen = torch.zeros_like(where)
    for top, left in tile_corners(size, tile, where):
        seen[top : top + tile[0], left : left + tile[1]] = True
    return seen


def tile_starts(length: int, tile: int) -> list[int]:
    """Where the tiles begin that cover a line: evenly, with an overlap of at least a quarter of a tile."""
    stride = tile - tile // OVERLAP
    count = 1 + -(-(length - tile) // stride)
    return [round(i * (length - tile) / max(count - 1, 1)) for i in range(count)]


def _tent(length: int, like: Tensor) -> Tensor:
    """Weights of a line of pixels, highest in its middle."""
    place = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(place, length + 1 - place)
