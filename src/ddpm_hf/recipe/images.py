"""A look at a set of images before training: what a person would want to know of them, and what the rules need."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.sources import Source, Stream
from ..data.transform import Transform, Unreadable, decode, image_format

if TYPE_CHECKING:
    from ..config.training import TrainConfig

SAMPLE = 512  # images that are looked at
PART = 32  # of them at a time
SIDE = 16  # pixels of their thumbnails
HASH_SIDE = 8
NEAR_CORRELATION = 0.99
NEAR = 2  # bits of 64 in which the hashes of near-duplicates differ at most
CLASS_LIMIT = 1000
ALPHA_MODES = ("LA", "RGBA", "PA", "La", "RGBa")
GRAY_LEVELS = 2.0  # of 255: the difference of channels that the compression of a gray image may leave


@dataclass(frozen=True)
class Look:
    """What a sample of a set of images shows.

    Args:
        name: of the set.
        count: of all images; None for a stream.
        side: the median of the shorter sides, in pixels.
        smallest: the shortest side of any.
        mode: L, RGB or their like with alpha: the mode that loses nothing.
        mirrored: the share of images that are nearer to others' mirror images than to others; 1/2 where left and right
            are alike, 0 for text. NaN for too few images.
        near_duplicates: the share of images that have a near-duplicate in the sample.
        folders: the numbers of images in each sub-folder, where there are sub-folders.
        unreadable: images of the sample that can't be read.
        decode_seconds: for one image, by one process.
        transparent: the share of images with transparent parts.
        are_equal: whether no image differs from another.
        class_column: of a data set that knows classes.
        class_names: theirs.
    """

    name: str
    count: int | None
    side: int
    smallest: int
    mode: str
    mirrored: float
    near_duplicates: float
    folders: tuple[tuple[str, int], ...]
    unreadable: tuple[Unreadable, ...]
    looked_at: int
    decode_seconds: float
    transparent: float = 0.0
    are_equal: bool = False
    class_column: str = ""
    class_names: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Of the mode."""
        return len(self.mode)


def look_at(source: Source | Stream, config: TrainConfig, seconds: float = math.inf) -> Look:
    """Look at a sample of a set of images, drawn by the seed.

    Args:
        seconds: after which no more images are looked at than those begun with: photographs of 24 megapixels take one
            each.

    Raises:
        ValueError: where none of them can be read.
    """
    paths: list[str | None] = []
    formats, unreadable, readable = [], [], []
    began = time.perf_counter()
    for part in _parts(source, config):
        for index, raw in part:
            found = image_format(raw)
            has_alpha = found is not None and found[2] in ALPHA_MODES
            decoded = decode(index, raw, Transform(SIDE, "RGBA" if has_alpha else "RGB"))
            if isinstance(decoded, Unreadable):
                unreadable.append(decoded)
            elif found is not None:
                formats.append(found)
                readable.append(decoded if has_alpha else np.concatenate([decoded, np.full_like(decoded[:1], 255)]))
        paths += [raw["path"] if isinstance(raw, dict) else None for _, raw in part]
        if time.perf_counter() - began > seconds:
            break
    if not readable:
        raise unreadable[0].error(source.name)
    pixels = np.stack(readable)
    gray = pixels[:, :3].mean(1, dtype=np.float32)
    sides = [min(width, height) for width, height, _ in formats]
    column, names = source.classes or ("", ())
    return Look(
        name=source.name,
        count=len(source) if isinstance(source, Source) else None,
        side=int(np.median(sides)),
        smallest=min(sides),
        mode=_mode(pixels),
        mirrored=mirrored_share(gray),
        near_duplicates=near_duplicates(gray),
        folders=_folders(paths) if config.train_data_dir is not None else (),
        unreadable=tuple(unreadable),
        looked_at=len(paths),
        decode_seconds=(time.perf_counter() - began) / len(paths),
        transparent=float((pixels[:, 3] < 255).any((1, 2)).mean()),
        are_equal=len(pixels) > 1 and not np.ptp(pixels, axis=0).any(),
        class_column=column,
        class_names=tuple(names),
    )


def _parts(source: Source | Stream, config: TrainConfig) -> Iterator[list[tuple[int, Any]]]:
    """The sample, in parts: each is drawn from all images, and read where they lie beside each other."""
    if isinstance(source, Source):
        chosen = np.random.default_rng(config.seed).permutation(len(source))[:SAMPLE]
        for first in range(0, len(chosen), PART):
            indices = np.sort(chosen[first : first + PART]).tolist()
            yield list(zip(indices, source.read(indices), strict=True))
    else:
        rows = [(row.position, row.raw) for row in source.first_rows(SAMPLE, config.seed)]
        for first in range(0, len(rows), PART):
            yield rows[first : first + PART]


def _mode(pixels: np.ndarray) -> str:
    """The mode that loses nothing: gray where all channels are equal, without alpha where all is opaque."""
    colors = pixels[:, :3].astype(np.float32)
    is_gray = np.abs(colors - colors.mean(1, keepdims=True)).mean() < GRAY_LEVELS
    has_alpha = bool((pixels[:, 3] < 255).any())
    return ("L" if is_gray else "RGB") + ("A" if has_alpha else "")


def mirrored_share(gray: np.ndarray) -> float:
    """How often the nearest neighbour of an image is a mirror image: 1/2 where left and right make no difference.

    Half of the images are neighbours, as they are and mirrored, of the other half. Text, digits and things that always
    face the same way give less than a half. Neighbours of photographs are no likelier to be one than the other.

    Args:
        gray: (N, H, W).
    """
    if len(gray) < 64:
        return float("nan")
    flat = _standardized(gray)
    mirror = flat.reshape(gray.shape)[:, :, ::-1].reshape(flat.shape)
    queries = flat[::2]
    as_they_are, mirrored = queries @ flat[1::2].T, queries @ mirror[1::2].T
    best, best_mirrored = as_they_are.max(1), mirrored.max(1)
    return float(np.mean((best_mirrored > best) + 0.5 * (best_mirrored == best)))


def _standardized(gray: np.ndarray) -> np.ndarray:
    """Flat images of mean 0 and norm 1."""
    flat = gray.reshape(len(gray), -1).astype(np.float64)
    flat = flat - flat.mean(1, keepdims=True)
    return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-9)


def near_duplicates(gray: np.ndarray) -> float:
    """The share of images of which another is a near-duplicate: by a hash of the signs of gradients, and by pixels.

    Args:
        gray: (N, 16, 16); pairs of pixels are averaged to 8 rows of 9.
    """
    rows = gray.reshape(len(gray), HASH_SIDE, 2, -1).mean(2)
    positions = np.linspace(0, rows.shape[2] - 1, HASH_SIDE + 1).round().astype(int)
    bits = np.diff(rows[:, :, positions], axis=2).reshape(len(gray), -1) > 1  # flat parts are 0
    signs = bits.astype(np.float32) * 2 - 1
    flat = _standardized(gray)
    is_near = ((signs.shape[1] - signs @ signs.T) / 2 <= NEAR) & (flat @ flat.T > NEAR_CORRELATION)
    np.fill_diagonal(is_near, False)
    return float(is_near.any(1).mean())


def _folders(paths: list[str | None]) -> tuple[tuple[str, int], ...]:
    """The names of the sub-folders that the images of a folder lie in, with how many of the sample each has."""
    counts = Counter(Path(path).parent.name for path in paths if path)
    return tuple(sorted(counts.items())) if 1 < len(counts) <= CLASS_LIMIT else ()
