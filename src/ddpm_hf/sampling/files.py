"""Files of sampled images: numbered PNGs, or one `.npz`, written atomically.

Both store batches as they come, from any number of processes, and list the images that exist.
"""

from __future__ import annotations

import math
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.pictures import to_pil
from ..storage.files import write_atomically
from .generate import cycle_labels, index_batches


@dataclass
class PngFiles:
    """`00000.png`, `00001.png`, … in a folder."""

    folder: Path

    def existing(self) -> set[int]:
        """Indices of the images that exist."""
        return {int(file.stem) for file in self.folder.glob("*.png") if file.stem.isdecimal()}

    def save(self, images: range, pixels: Tensor) -> None:
        """Store a batch, uint8 of shape (B, C, H, W)."""
        for i, image in zip(images, to_pil(pixels), strict=True):
            write_atomically(self._file(i), partial(image.save, format="PNG"))

    def first(self, count: int) -> list[Image.Image]:
        """The first images."""
        return [Image.open(self._file(i)) for i in range(count)]

    def _file(self, i: int) -> Path:
        return self.folder / f"{i:05d}.png"


@dataclass
class NpzFile:
    """`samples.npz` in a folder: `arr_0`, uint8 of shape (N, H, W, C), and `arr_1`, int64 labels, if there are any.

    This is what the evaluators of guided-diffusion and its successors read. Batches are `shards/<first image>.npy`,
    (B, H, W, C), until `pack` joins them.

    `arr_0` is written and read in batches, by numpy's functions for its header: `np.savez` and `np.load` would hold all
    images in memory, and `np.lib.format.open_memmap` maps no member of an archive, so that the disk would have to hold
    the images once more.
    """

    folder: Path

    @property
    def file(self) -> Path:
        """The `.npz`."""
        return self.folder / "samples.npz"

    @property
    def _shards(self) -> Path:
        return self.folder / "shards"

    def existing(self) -> set[int]:
        """Indices of the images that exist."""
        images: set[int] = set()
        if self.file.exists():
            with _open_pixels(self.file) as (_, shape):
                images.update(range(shape[0]))
        for shard in self._shards.glob("*.npy"):
            first = int(shard.stem)
            images.update(range(first, first + len(np.load(shard, mmap_mode="r"))))
        return images

    def save(self, images: range, pixels: Tensor) -> None:
        """Store a batch, uint8 of shape (B, C, H, W)."""
        self._shards.mkdir(exist_ok=True)
        write_atomically(self._shard(images), lambda stream: np.save(stream, pixels.permute(0, 2, 3, 1).numpy()))

    def pack(self, num_images: int, batch_size: int, shape: Sequence[int], class_labels: Sequence[int] | None) -> None:
        """Write the file, from the shards and the images of an earlier one; one batch at a time is in memory.

        Args:
            shape: (H, W, C).
        """
        if not self._shards.exists():
            return

        def write(stream: IO[bytes]) -> None:
            with zipfile.ZipFile(stream, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as pixels:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (num_images, *shape)}
                    np.lib.format.write_array_header_1_0(pixels, header)
                    for batch in self._stored_batches(index_batches(num_images, batch_size), math.prod(shape)):
                        pixels.write(batch)
                if class_labels:
                    with archive.open("arr_1.npy", "w") as labels:
                        np.save(labels, np.array(cycle_labels(class_labels, range(num_images)), np.int64))

        write_atomically(self.file, write, sync=True)  # before the shards are deleted
        shutil.rmtree(self._shards)

    def _stored_batches(self, batches: list[range], image_bytes: int) -> Iterator[bytes]:
        """The pixels of all batches in order, from its shard or else from the earlier file."""
        with _open_pixels(self.file) if self.file.exists() else nullcontext((BytesIO(), ())) as (earlier, _):
            for batch in batches:
                pixels = earlier.read(len(batch) * image_bytes)
                shard = self._shard(batch)
                yield np.load(shard).tobytes() if shard.exists() else pixels

    def first(self, count: int) -> list[Image.Image]:
        """The first images."""
        with _open_pixels(self.file) as (stream, (_, *shape)):
            pixels = np.frombuffer(stream.read(count * math.prod(shape)), np.uint8).reshape(count, *shape)
        return to_pil(torch.tensor(pixels).permute(0, 3, 1, 2))

    def _shard(self, images: range) -> Path:
        return self._shards / f"{images.start:08d}.npy"


def image_files(folder: Path, format: Literal["png", "npz"]) -> PngFiles | NpzFile:
    """The images in a folder, in this format."""
    return PngFiles(folder) if format == "png" else NpzFile(folder)


@contextmanager
def _open_pixels(file: Path) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
    """The bytes of `arr_0`, and its shape.

    Raises:
        ValueError: for a file without such images, or a damaged one: reading all of `arr_0` verifies its checksum.
    """
    try:
        with zipfile.ZipFile(file) as archive, archive.open("arr_0.npy") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            if dtype != np.uint8 or len(shape) != 4:
                raise ValueError(f"arr_0 is {dtype} of shape {shape}, not uint8 of shape (N, H, W, C)")
            yield stream, shape
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"{str(file)!r} is damaged, or was not written by `ddpm-hf sample` ({error}): move it away, or choose "
            "another --output_dir."
        ) from error
