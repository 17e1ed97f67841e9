"""What is measured of a photograph, at a size that a network serves, and how the restored image becomes a photograph.

A network knows things at the size they had in its training images. So a photograph with a hole, or without colors, is
resized until its shorter side is the network's, unless it is to be worked on at its own scale; a longer side is covered
by overlapping tiles. Thin holes, such as scratches, are painted at the photograph's own scale, since what is around
them says enough. Enlarging and deblurring work at that scale always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL.Image import Resampling
from torch import Tensor

from ..data.pixels import to_uint8
from .operators import Blur, Compose, Downsample, Grayscale, Inpaint, Operator
from .photos import Photo, resize
from .tiles import tile_corners

THIN = 4  # a hole is thin that is no wider than a quarter of the network's images
MOST_TILES = 1024  # of a thin hole; with more, the photograph is resized
LUMA_ROUNDS = 20  # of setting the luma and clipping, of which two are nearly always enough


@dataclass(frozen=True)
class Task:
    """One photograph, ready for `restore`.

    Args:
        measurement: (1, *) in [0, 1].
        size: (H, W) of the images to make.
        finish: from an image (C, H, W) in [0, 1] to the photograph's new pixels, uint8 (C, H', W').
    """

    measurement: Tensor
    operator: Operator
    size: tuple[int, int]
    finish: Callable[[Tensor], Tensor]


def inpainting(
    photo: Photo, hole: Tensor, network_size: tuple[int, int], tiles: bool, most_tiles: int = MOST_TILES
) -> Task:
    """Paint the part of a photograph where `hole` (bool, (H, W)) is true; the rest of it stays untouched.

    Args:
        tiles: work at the photograph's own scale, even if the hole is not thin.
        most_tiles: that a thin hole may take.

    Raises:
        ValueError: for a mask of another size, or a photograph smaller than a tile.
    """
    if tuple(hole.shape) != photo.size:
        raise ValueError(f"it has {_times(photo.size)} pixels, but its mask has {_times(hole.shape)}: make them equal")
    size = _fitting_size(photo, network_size, tiles or _is_thin(hole, network_size, most_tiles))
    # Weights of both filters are at least 0, so a pixel is known if the filter sees nothing of the hole.
    filter = Resampling.BOX if size[0] <= photo.size[0] else Resampling.BILINEAR
    known = resize(hole[None].float(), size, filter)[0] <= 1e-6
    image = torch.where(known, resize(photo.image[0], size, filter), 0)
    return Task(image[None], Inpaint(known), size, partial(_paint, photo, hole))


def coloring(gray: Photo, network_size: tuple[int, int], tiles: bool) -> Task:
    """Give a gray photograph colors of the same luma.

    Raises:
        ValueError: for a photograph smaller than a tile.
    """
    size = _fitting_size(gray, network_size, tiles)
    luma = resize(gray.image[0], size).clamp(0, 1)
    return Task(luma[None], Grayscale(), size, partial(_color, gray))


def enlarging(photo: Photo, factor: int, network_size: tuple[int, int]) -> Task:
    """Enlarge a photograph. One that is too small even then is enlarged further, and made smaller afterwards."""
    whole = max(factor, *(-(-needed // side) for needed, side in zip(network_size, photo.size, strict=True)))
    height, width = photo.size
    final = (height * factor, width * factor)
    return Task(photo.image, Downsample(whole), (height * whole, width * whole), partial(_shrink, final))


def deblurring(photo: Photo, kernel: Tensor, network_size: tuple[int, int]) -> Task:
    """Sharpen a photograph that a kernel, (h, w), has blurred.

    Pixels whose blur saw beyond the border are not used, since nobody knows what lay there.

    Raises:
        ValueError: for a photograph smaller than the network's images, or too small for the kernel.
    """
    size = _fitting_size(photo, network_size, True)
    borders = [side // 2 for side in kernel.shape]
    if any(side <= 2 * border for side, border in zip(size, borders, strict=True)):
        raise ValueError(f"it has {_times(size)} pixels, too few for a kernel of {_times(kernel.shape)}")
    inside = torch.zeros(size, dtype=torch.bool)
    inside[borders[0] : size[0] - borders[0], borders[1] : size[1] - borders[1]] = True
    return Task(photo.image * inside, Compose(Blur(kernel), Inpaint(inside)), size, _to_pixels)


def editing(photo: Photo, network_size: tuple[int, int], tiles: bool) -> Task:
    """Change a photograph as a whole: nothing is measured, and `measurement` is the image to start from.

    Raises:
        ValueError: for a photograph smaller than a tile.
    """
    size = _fitting_size(photo, network_size, tiles)
    image = resize(photo.image[0], size).clamp(0, 1)
    return Task(image[None], Inpaint(torch.zeros(size)), size, partial(_shrink, photo.size))


def common_operator(tasks: Sequence[Task]) -> Operator:
    """The operator of several photographs of one kind and size, each with its own mask."""
    operators = [task.operator for task in tasks]
    masks = [operator.mask for operator in operators if isinstance(operator, Inpaint)]
    return Inpaint(torch.cat(masks)) if masks else operators[0]


def _is_thin(hole: Tensor, network_size: tuple[int, int], most_tiles: int) -> bool:
    """Whether every pixel of a hole is near its edge, and the tiles that see it are not too many."""
    size = (hole.shape[0], hole.shape[1])
    if any(side < needed for side, needed in zip(size, network_size, strict=True)):
        return False
    reach = min(network_size) // THIN // 2
    near = torch.nn.functional.max_pool2d((~hole)[None, None].float(), 2 * reach + 1, 1, reach)
    return bool(near.all()) and len(tile_corners(size, network_size, hole)) <= most_tiles


def _fitting_size(photo: Photo, network_size: tuple[int, int], own_scale: bool) -> tuple[int, int]:
    """(H, W) that the network serves: the photograph's, or one whose shorter side is the network's."""
    if own_scale:
        if any(side < needed for side, needed in zip(photo.size, network_size, strict=True)):
            raise ValueError(
                f"it has {_times(photo.size)} pixels, but the model makes {_times(network_size)}, and nothing smaller"
            )
        return photo.size
    scale = max(needed / side for side, needed in zip(photo.size, network_size, strict=True))
    height, width = (max(needed, round(side * scale)) for side, needed in zip(photo.size, network_size, strict=True))
    return height, width


def _paint(photo: Photo, hole: Tensor, image: Tensor) -> Tensor:
    pixels = photo.pixels.clone()
    pixels[:, hole] = _to_pixels(resize(image, photo.size))[:, hole]
    return pixels


def _color(gray: Photo, image: Tensor) -> Tensor:
    """The photograph's own luma, with the image's colors."""
    colored, luma = resize(image, gray.size)[None], Grayscale()
    for _ in range(LUMA_ROUNDS):
        colored = (colored + gray.image - luma(colored)).clamp(0, 1)
    return _to_pixels(colored[0])


def _shrink(size: tuple[int, int], image: Tensor) -> Tensor:
    return _to_pixels(resize(image, size))


def _to_pixels(image: Tensor) -> Tensor:
    """[0, 1] → uint8."""
    return to_uint8(2 * image - 1)


def _times(size: Sequence[int]) -> str:
    """Width and height, as people say it."""
    return f"{size[1]}×{size[0]}"
