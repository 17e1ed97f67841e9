"""The decoded images of a source in one memory-mapped file, built once for all processes and later runs.

A cache is a folder. `pixels.bin` is appended to; `progress.json` records how much of it has reached the disk, where an
interrupted build resumes; `cache.json` is written last, and a cache without it is incomplete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..config.training import TrainConfig
from ..storage.files import free_bytes, write_atomically
from .decoding import decode_batches, decode_rows
from .sources import Source
from .transform import Transform, Unreadable

RECORD_EVERY = 32 * 2**20  # decoded bytes: the most that an interrupted build loses
REQUEST = 2 * 2**20  # decoded bytes that a worker returns at once
MANY_IMAGES = 1000  # from this number on, starting worker processes pays


@dataclass
class Survey:
    """What is known of the images of a source: how many were tried, and which of them can't be read."""

    tried: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)

    @property
    def readable(self) -> np.ndarray:
        """Indices of the images that can be read, int64."""
        return np.delete(np.arange(self.tried), [bad.index for bad in self.unreadable])


class ImageCache:
    """The decoded images of a source, in a folder below `root`; without `keep_pixels`, only the survey of them."""

    def __init__(self, root: Path, source: Source, transform: Transform, keep_pixels: bool = True) -> None:
        key = json.dumps([source.fingerprint, asdict(transform), keep_pixels])
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:24]
        self.source, self.transform, self.keep_pixels = source, transform, keep_pixels
        self.image_bytes = int(np.prod(transform.shape)) * transform.dtype.itemsize
        self.pixels_file = self.folder / "pixels.bin"

    @property
    def present_bytes(self) -> int:
        """The size of `pixels.bin`, complete or not."""
        return self.pixels_file.stat().st_size if self.pixels_file.is_file() else 0

    def load(self) -> Survey | None:
        """The survey, if the cache is complete."""
        return self._survey("cache.json")

    def pixels(self, survey: Survey) -> np.ndarray:
        """The readable images, (n, C, H, W), mapped into memory copy-on-write: the file never changes."""
        return np.memmap(
            self.pixels_file, self.transform.dtype, mode="c", shape=(len(survey.readable), *self.transform.shape)
        )

    def build(self, skip_unreadable: bool, show_progress: bool = True) -> Survey:
        """Load the cache, or build it. Of several processes that want the same one, one builds it and the others wait.

        Raises:
            ValueError: for an image that can't be read, unless they are skipped; if no image can be read.
            OSError: if the folder can't be written to, or the disk is full.
        """
        survey = self.load()
        if survey is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self._locked(show_progress):
                    survey = self.load() or self._build(skip_unreadable, show_progress)
            except OSError as error:
                raise OSError(
                    f"the decoded images can't be written to {self.folder} ({error}): free some space, choose another "
                    "folder with --cache_dir, or decode on the fly with --cache_limit_gb 0."
                ) from error
        if survey.unreadable and not skip_unreadable:
            raise survey.unreadable[0].error(self.source.name)
        return survey

    @contextmanager
    def _locked(self, show_progress: bool) -> Iterator[None]:
        """Lock the folder; while another process holds the lock, wait and show its progress."""
        lock = FileLock(self.folder / "lock")
        with self._bar(0, show_progress, leave=False, delay=1) as bar:
            while not lock.is_locked:
                try:
                    lock.acquire(timeout=1)
                except Timeout:
                    bar.update(self.present_bytes // self.image_bytes - bar.n)
        try:
            yield
        finally:
            lock.release()

    def _build(self, skip_unreadable: bool, show_progress: bool) -> Survey:
        total, name = len(self.source), self.source.name
        survey = self._survey("progress.json") or Survey()
        self.pixels_file.touch()
        with self.pixels_file.open("r+b") as file, self._bar(survey.tried, show_progress) as bar:
            file.truncate(self._expected_bytes(survey))
            file.seek(0, os.SEEK_END)
            recorded = survey.tried
            decoder = partial(decode_rows, self.source, self.transform)
            for decoded in decode_batches(decoder, self._requests(recorded), _workers(total - recorded)):
                if decoded.unreadable and not skip_unreadable:
                    raise decoded.unreadable[0].error(name)
                if self.keep_pixels:
                    file.write(decoded.pixels.numpy().data)
                survey.unreadable += decoded.unreadable
                survey.tried += len(decoded.pixels) + len(decoded.unreadable)
                bar.update(survey.tried - bar.n)
                if (survey.tried - recorded) * self.image_bytes >= RECORD_EVERY:
                    self._record(survey, file, "progress.json")
                    recorded = survey.tried
            if len(survey.unreadable) == total:
                raise ValueError(
                    f"none of the {total} images can be read. The first: {survey.unreadable[0].error(name)}"
                )
            self._record(survey, file, "cache.json")
        (self.folder / "progress.json").unlink(missing_ok=True)
        return survey

    def _bar(self, done: int, show_progress: bool, **options: Any) -> tqdm:
        total, label = len(self.source), f"Decoding {self.source.name}"
        return tqdm(total=total, initial=done, desc=label, unit="img", disable=not show_progress, **options)

    def _requests(self, first: int) -> Iterator[range]:
        size = min(256, max(1, REQUEST // self.image_bytes))
        total = len(self.source)
        return (range(i, min(i + size, total)) for i in range(first, total, size))

    def _record(self, survey: Survey, pixels: BinaryIO, name: str) -> None:
        """Record that the pixels of these images are on the disk. Both are synced, to survive a loss of power."""
        pixels.flush()
        os.fsync(pixels.fileno())
        record = json.dumps(asdict(survey), indent=1).encode()
        write_atomically(self.folder / name, lambda stream: stream.write(record), sync=True)

    def _survey(self, name: str) -> Survey | None:
        """The survey in a record, unless the record or pixels that it counts are missing."""
        try:
            record = json.loads((self.folder / name).read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        survey = Survey(record["tried"], [Unreadable(**bad) for bad in record["unreadable"]])
        return survey if self.present_bytes >= self._expected_bytes(survey) else None

    def _expected_bytes(self, survey: Survey) -> int:
        return len(survey.readable) * self.image_bytes if self.keep_pixels else 0


def _workers(images: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and images >= MANY_IMAGES else 0


def cache_root(config: TrainConfig) -> Path:
    """The folder of all caches of decoded images, in the cache folder of `datasets`."""
    import datasets

    return Path(config.cache_dir or datasets.config.HF_DATASETS_CACHE) / "decoded_images"


def fits_disk(cache: ImageCache, limit_gb: float | None) -> bool:
    """Whether all decoded images may be stored; without a limit, they may take half of the free disk space."""
    free = free_bytes(cache.folder) + cache.present_bytes
    limit = free / 2 if limit_gb is None else min(free, limit_gb * 1e9)
    return len(cache.source) * cache.image_bytes <= limit
