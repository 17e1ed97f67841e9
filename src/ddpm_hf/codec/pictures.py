"""Image files → arrays of the network's size, and back: names, modes and sizes, and tiles of larger images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# Modes of Pillow that a network of 1 or 3 channels holds without loss.
MODES = {1: ("L", "1"), 3: ("RGB", "L", "1")}
# What Pillow writes without loss, by the ending of a file; images of other formats become PNGs.
LOSSLESS_FORMATS = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF", ".pgm": "PPM", ".ppm": "PPM"}
MAX_SIDE = 1_000_000
NUMBERED = re.compile(r"(.*?)([0-9]{1,15})(\D*)", re.DOTALL)


@dataclass(frozen=True)
class Picture:
    """What a file says of an image, next to its pixels.

    Args:
        name: of the file that it is written to again.
        mode: Pillow's.
        size: (W, H).
    """

    name: str
    mode: str
    size: tuple[int, int]


def read_picture(file: Path, channels: int) -> tuple[Picture, NDArray[np.uint8]]:
    """An image file, upright, and its pixels (C, H, W).

    Raises:
        ValueError: names the file, and what to do, if it can't be read, or not without loss.
    """
    try:
        with Image.open(file) as image:
            image.load()
            frames = getattr(image, "n_frames", 1)
            upright = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise ValueError(f"{str(file)!r} is not an image in a format that Pillow reads.") from None
    except Exception as error:  # on damaged files, Pillow's plugins raise nearly anything
        raise ValueError(f"{str(file)!r} can't be read ({str(error) or type(error).__name__}).") from error
    if frames > 1:
        raise ValueError(f"{str(file)!r} has {frames} frames: save each as a file of its own.")
    suffix = file.suffix if file.suffix.lower() in LOSSLESS_FORMATS else ".png"
    return from_image(upright, f"{file.stem}{suffix}", channels, repr(str(file)))


def from_image(image: Image.Image, name: str, channels: int, subject: str) -> tuple[Picture, NDArray[np.uint8]]:
    """An image of Pillow, and its pixels (C, H, W).

    Args:
        subject: what errors call it.

    Raises:
        ValueError: if the network can't hold its mode.
    """
    if channels not in MODES:
        raise ValueError(f"the model has {channels} channels, but image files need one of 1 or 3: pass a tensor.")
    modes = MODES[channels]
    if image.mode not in modes or image.has_transparency_data:
        found = "transparent pixels" if image.has_transparency_data else f"mode {image.mode!r}"
        remedy = "convert it to gray" if channels == 1 else "convert it to RGB with 8 bits per channel"
        raise ValueError(
            f"{subject} has {found}, but the model holds images of mode {' or '.join(map(repr, modes))}: {remedy}."
        )
    pixels = np.array(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)
    return Picture(name, image.mode, image.size), pixels.transpose(2, 0, 1)


def to_image(picture: Picture, pixels: NDArray[np.uint8]) -> Image.Image:
    """The image of Pillow that `from_image` got."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return image.convert(picture.mode, dither=Image.Dither.NONE)


def format_of(file: Path) -> str:
    """Pillow's name of the format that a decoded image is written in."""
    return LOSSLESS_FORMATS.get(file.suffix.lower(), "PNG")


def check_names(files: Sequence[Path], pictures: Sequence[Picture]) -> None:
    """Raise a ValueError where two images would be written to one file."""
    owners: dict[str, Path] = {}
    for file, picture in zip(files, pictures, strict=True):
        owner = owners.setdefault(picture.name.casefold(), file)
        if owner is not file:
            raise ValueError(
                f"{str(owner)!r} and {str(file)!r} would both be restored as {picture.name!r}: rename one, or compress "
                "them into two files."
            )


# --- tiles -----------------------------------------------------------------------------------------------------------


def cut(pixels: NDArray[np.uint8], tile: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """An image (C, H, W) as tiles (C, *tile), row by row; edges are repeated where it is no multiple of them."""
    _, height, width = pixels.shape
    rows, columns = _grid((width, height), tile)
    pad = ((0, 0), (0, rows * tile[0] - height), (0, columns * tile[1] - width))
    padded = np.pad(pixels, pad, mode="edge")
    return [
        padded[:, i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
        for i in range(rows)
        for j in range(columns)
    ]


def count_tiles(size: tuple[int, int], tile: tuple[int, int]) -> int:
    """How many tiles of (H, W) an image of (W, H) is cut into."""
    rows, columns = _grid(size, tile)
    return rows * columns


def assemble(tiles: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image (C, H, W) of size (W, H) that was cut into tiles (n, C, h, w)."""
    _, channels, height, width = tiles.shape
    rows, columns = _grid(size, (height, width))
    grid = tiles.reshape(rows, columns, channels, height, width).transpose(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)[:, : size[1], : size[0]]


def _grid(size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    return -(-size[1] // tile[0]), -(-size[0] // tile[1])


# --- in the header of a file -----------------------------------------------------------------------------------------


def describe_pictures(pictures: Sequence[Picture]) -> dict[str, Any]:
    """Names, modes and sizes as JSON, where runs of equal ones, and of names that count, take little room."""
    return {
        "names": _runs_of_names([p.name for p in pictures]),
        "modes": _runs([p.mode for p in pictures]),
        "sizes": _runs([list(p.size) for p in pictures]),
    }


def read_pictures(described: Any, channels: int) -> list[Picture]:
    """What `describe_pictures` wrote.

    Raises:
        ValueError: for anything else, and for names that lead out of a folder.
    """
    try:
        names: list[str] = []
        for entry in described["names"]:
            if isinstance(entry, str):
                names.append(entry)
            else:
                before, first, digits, after, count = entry
                if type(first) is not int or type(digits) is not int or not 1 <= digits <= 15:
                    raise ValueError(f"names that count from {first!r}")
                names += [f"{before}{first + i:0{digits}}{after}" for i in range(_count(count))]
        modes = [mode for count, mode in described["modes"] for _ in range(_count(count))]
        sizes = [tuple(size) for count, size in described["sizes"] for _ in range(_count(count))]
        pictures = [Picture(*each) for each in zip(names, modes, sizes, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its list of images is damaged ({error})") from error
    for picture in pictures:
        name, size = picture.name, picture.size
        if name in ("", ".", "..") or Path(name).name != name or {"/", "\\", "\0"} & set(name):
            raise ValueError(f"it has an image named {name!r}, which is no name of a file")
        if picture.mode not in MODES.get(channels, ()):
            raise ValueError(f"it has an image of mode {picture.mode!r}, which {channels} channels can't hold")
        if len(size) != 2 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in size):
            raise ValueError(f"it has an image of size {size!r}")
    if len({picture.name.casefold() for picture in pictures}) < len(pictures) or not pictures:
        raise ValueError("its list of images is empty, or has a name twice")
    return pictures


def _count(count: Any) -> int:
    if type(count) is not int or not 1 <= count <= 10_000_000:
        raise ValueError(f"a count of {count!r}")
    return count


def _runs(values: Sequence[Any]) -> list[list[Any]]:
    runs: list[list[Any]] = []
    for value in values:
        if runs and runs[-1][1] == value:
            runs[-1][0] += 1
        else:
            runs.append([1, value])
    return runs


def _runs_of_names(names: Sequence[str]) -> list[Any]:
    """Names, and [before, first number, digits, after, count] of names that count up."""
    runs: list[Any] = []
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match is None:
            runs.append(name)
            continue
        before, number, after = match[1], match[2], match[3]
        last = runs[-1] if runs and isinstance(runs[-1], list) else None
        if last and [*last[:1], *last[2:4]] == [before, len(number), after] and int(number) == last[1] + last[4]:
            last[4] += 1
        else:
            runs.append([before, int(number), len(number), after, 1])
    return [_single(run) for run in runs]


def _single(run: Any) -> Any:
    if isinstance(run, list) and run[4] == 1:
        return f"{run[0]}{run[1]:0{run[2]}}{run[3]}"
    return run
