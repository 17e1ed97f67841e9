"""The decoded images of a source in one memory-mapped file, built once for all processes and later runs.

A cache is a folder. Each build writes a pixel file of its own, `pixels-<token>.bin`; `progress-<token>.json` records
every few seconds, and when the build is interrupted, how much of it has reached the disk, which the next build copies.
`cache.json` is written last and names its pixel file; a cache without it is incomplete. So machines that share the
disk, but not their locks, can build at the same time: the first to finish makes the cache. `about.json` says what the
images are, and its time when they were last used.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from ..progress import Bar, progress
from ..storage.files import free_bytes, read_json, share, write_atomically, write_text_atomically
from .decoding import decode_batches, decode_rows
from .sources import Source
from .transform import Transform, Unreadable, image_format

ABOUT = "about.json"
SQUARE = "square"  # a file, where all images are known to be square
RECORD_SECONDS = 5.0  # the most that a killed build loses, beside what is being decoded
REQUEST = 2 * 2**20  # decoded bytes that a worker returns at once
REQUEST_IMAGES = 16  # and images, since large photographs take long, however small they become
MANY_IMAGES = 1000  # from this number on, starting worker processes pays


@dataclass
class Survey:
    """What is known of the images of a source: how many were tried, which can't be read, where the pixels are."""

    tried: int = 0
    unreadable: list[Unreadable] = field(default_factory=list)
    pixels: str = "pixels.bin"  # the name of their file; version 0.1 did not record it

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

    @property
    def present_bytes(self) -> int:
        """The size of the pixel file, complete or not; of several builds, the most advanced one's."""
        return max((_size(file) for file in self.folder.glob("pixels*")), default=0)

    def load(self) -> Survey | None:
        """The survey, if the cache is complete."""
        return read_survey(self.folder / "cache.json", self._kept_bytes)

    def pixels(self, survey: Survey) -> np.ndarray:
        """The readable images, (n, C, H, W), mapped into memory copy-on-write: the file never changes."""
        shape = (len(survey.readable), *self.transform.shape)
        with (self.folder / survey.pixels).open("rb") as file:
            share(file)  # as long as it is mapped
            return np.memmap(file, self.transform.dtype, mode="c", shape=shape)

    def build(self, skip_unreadable: bool, show_progress: bool = True) -> Survey:
        """Load the cache, or build it. Of several processes that want the same one, one builds it and the others wait.

        Raises:
            ValueError: for an image that can't be read, unless they are skipped; if no image can be read.
            OSError: if the folder can't be written to, or the disk is full.
        """
        self._note_use()
        survey = self.load()
        if survey is None:
            try:
                with self._locked(show_progress):
                    survey = self.load() or self._build(skip_unreadable, show_progress)
            except OSError as error:
                survey = self.load()  # another machine has finished, and removed what this one had begun
                if survey is None:
                    raise OSError(
                        f"the decoded images can't be written to {self.folder} ({error}): free some space, choose "
                        "another folder with --cache_dir, or decode on the fly with --cache_limit_gb 0."
                    ) from error
        if survey.unreadable and not skip_unreadable:
            raise survey.unreadable[0].error(self.source.name)
        return survey

    def _note_use(self) -> None:
        """Write down what the cache is of, and that it is used now."""
        crop = (
            "center crops" if self.transform.crop_seed is None else f"random crops of seed {self.transform.crop_seed}"
        )
        size, contents = self.transform.resolution, crop if self.keep_pixels else "only which can be read"
        images = f"{self.source.name}: {len(self.source):,} images"
        about = {
            "description": f"{images}, {size}×{size} {self.transform.mode}, {contents}",
            "image_bytes": self._kept_bytes,
        }
        with suppress(OSError):  # where it may only be read
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / ABOUT).exists():
                write_text_atomically(self.folder / ABOUT, json.dumps(about, ensure_ascii=False))
            os.utime(self.folder / ABOUT)

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
        self.folder.mkdir(parents=True, exist_ok=True)
        builds = [read_survey(file, self._kept_bytes) for file in self.folder.glob("progress*.json")]
        begun = max((survey for survey in builds if survey), key=lambda survey: survey.tried, default=Survey())
        token = uuid.uuid4().hex
        survey = replace(begun, pixels=f"pixels-{token}.bin")
        progress = self.folder / f"progress-{token}.json"
        decoder = partial(decode_rows, self.source, self.transform)
        batches = decode_batches(decoder, self._requests(begun.tried), _workers(total - begun.tried))
        with (self.folder / survey.pixels).open("wb") as file, self._bar(begun.tried, show_progress) as bar:
            self._copy(begun, file)
            try:
                with closing(batches):
                    for decoded, is_due in zip(batches, record_due(), strict=False):
                        if decoded.unreadable and not skip_unreadable:
                            raise decoded.unreadable[0].error(name)
                        if self.keep_pixels:
                            file.write(decoded.pixels.numpy().data)
                        tried = survey.tried + len(decoded.pixels) + len(decoded.unreadable)
                        # As a whole, since a signal may come at any moment.
                        survey = Survey(tried, survey.unreadable + decoded.unreadable, survey.pixels)
                        bar.update(tried - bar.n)
                        if is_due:
                            self._record(survey, file, progress)
            finally:
                self._record(survey, file, progress)
        if len(survey.unreadable) == total:
            raise ValueError(f"none of the {total} images can be read. The first: {survey.unreadable[0].error(name)}")
        finished = self._finish(progress)
        for leftover in [*self.folder.glob("progress*.json"), *self.folder.glob("pixels*.bin")]:
            if leftover.name != finished.pixels:
                leftover.unlink(missing_ok=True)
        return finished

    def _finish(self, progress: Path) -> Survey:
        """Make this build the cache, unless another machine has finished first: processes may have mapped its file."""
        final = self.folder / "cache.json"
        if self.load() is None:
            final.unlink(missing_ok=True)  # damaged
        try:
            os.link(progress, final)
        except FileExistsError:
            pass
        except OSError:  # no hard links on this disk
            progress.replace(final)
        finished = self.load()
        if finished is None:
            raise OSError(f"{final} or its pixels were removed by another process")
        return finished

    def _copy(self, begun: Survey, file: BinaryIO) -> None:
        """Begin a pixel file with what another build has on the disk; that build may still be at work elsewhere."""
        left = self._expected_bytes(begun)
        if left:
            with (self.folder / begun.pixels).open("rb") as source:
                while left:
                    left -= file.write(source.read(min(left, REQUEST)))

    def _bar(self, done: int, show_progress: bool, **options: Any) -> Bar[Any]:
        total, label = len(self.source), f"Decoding {self.source.name}"
        return progress(total=total, initial=done, desc=label, unit="img", is_shown=show_progress, **options)

    def _requests(self, first: int) -> Iterator[range]:
        size = min(REQUEST_IMAGES, max(1, REQUEST // self.image_bytes))
        total = len(self.source)
        return (range(i, min(i + size, total)) for i in range(first, total, size))

    def _record(self, survey: Survey, pixels: BinaryIO, file: Path) -> None:
        """Record that the pixels of these images are on the disk. Both are synced, to survive a loss of power."""
        pixels.flush()
        os.fsync(pixels.fileno())
        record = json.dumps(asdict(survey), indent=1).encode()
        write_atomically(file, lambda stream: stream.write(record), sync=True)

    @property
    def _kept_bytes(self) -> int:
        """Of an image, in the pixel file."""
        return self.image_bytes if self.keep_pixels else 0

    def _expected_bytes(self, survey: Survey) -> int:
        return len(survey.readable) * self._kept_bytes


def read_survey(file: Path, image_bytes: int) -> Survey | None:
    """The survey in a record, unless the record or some of the pixels that it counts are missing or damaged."""
    try:
        record = read_json(file)
        survey = Survey(**{**record, "unreadable": [Unreadable(**bad) for bad in record["unreadable"]]})
        present = _size(file.with_name(Path(survey.pixels).name))
        return survey if present >= len(survey.readable) * image_bytes else None
    except (FileNotFoundError, ValueError, TypeError, KeyError, IndexError):
        return None


def record_due() -> Iterator[bool]:
    """For ever: whether `RECORD_SECONDS` have passed since that was last so."""
    last = time.monotonic()
    while True:
        is_due = time.monotonic() - last >= RECORD_SECONDS
        yield is_due
        if is_due:
            last = time.monotonic()  # after what was due


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _workers(images: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and images >= MANY_IMAGES else 0


def cache_root(cache_dir: str | None) -> Path:
    """The folder of all caches of decoded images, in the cache folder of `datasets`."""
    import datasets

    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "decoded_images"


def choose_cache(root: Path, source: Source, transform: Transform, limit_gb: float | None) -> ImageCache | None:
    """The cache for these images, complete or not; None if it would be too large.

    Where all images are square, random crops of any seed and center crops are the same, and share a cache.
    """
    cache, seedless = (ImageCache(root, source, t) for t in (transform, replace(transform, crop_seed=None)))
    if limit_gb == 0 or cache.load() is not None:
        return None if limit_gb == 0 else cache
    if (seedless.folder / SQUARE).exists():
        cache = seedless
    if cache.load() is None and not _fits_disk(cache, limit_gb):
        return None
    if cache.folder != seedless.folder and _all_square(source):
        with suppress(OSError):  # it is found out again
            seedless.folder.mkdir(parents=True, exist_ok=True)
            (seedless.folder / SQUARE).touch()
        cache = seedless
    return cache


def _fits_disk(cache: ImageCache, limit_gb: float | None) -> bool:
    """Whether all decoded images may be stored; without a limit, they may take half of the free disk space."""
    free = free_bytes(cache.folder) + cache.present_bytes
    limit = free / 2 if limit_gb is None else min(free, limit_gb * 1e9)
    return len(cache.source) * cache.image_bytes <= limit


def _all_square(source: Source) -> bool:
    """Whether all images that can be read are square; only their headers are read, up to the first that is not."""
    requests = (range(i, min(i + 256, len(source))) for i in range(0, len(source), 256))
    formats = (image_format(raw) for request in requests for raw in source.read(request))
    return all(width == height for width, height, _ in filter(None, formats))
