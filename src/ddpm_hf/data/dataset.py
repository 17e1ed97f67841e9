"""Training images: batches in an order that is a function of progress. This is the way of x_0 from a file to a batch:

    sources     rows of anything that `datasets` opens: encoded bytes, or paths of files
    decoding    rows → stacked arrays, in worker processes, each image by
    transform   one image → uint8 or uint16 of shape (C, H, W)
    cache       all decoded images of a source in one memory-mapped file
    dataset     this file: any of these as batches of shape (B, C, H, W)
    pixels      integers → [-1, 1], by whoever uses a batch, on its device

`load_images` chooses between the cache, decoding on the fly, and streaming.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..progress import write
from .cache import ImageCache, Survey, cache_root, choose_cache
from .decoding import decode_batches, decode_rows, decode_stream_rows
from .sources import Source, Stream, StreamRow, open_source, open_stream
from .transform import Transform, Unreadable

if TYPE_CHECKING:
    from ..config.training import TrainConfig

BATCHES_AHEAD = 2  # read while a batch is used
SPARE_ROWS = 8  # rows of a stream read beyond each batch, to replace images that can't be read


class Batch(NamedTuple):
    """`pixels` is uint8, or uint16 where 16 bits are kept, of shape (B, C, H, W); `labels` int64 of shape (B,)."""

    pixels: Tensor
    labels: Tensor | None


class Images(ABC):
    """A training set: an endless, shuffled sequence of images that can be read from any position.

    Attributes:
        name: the name of the source, for messages.
        label_names: the names of the labels 0 … n - 1; None for unconditional training.
        skipped: the images left out by `--on_bad_image skip`. For a stream, the list grows as images are read.
        has_length: whether `len()` gives the number of images; False for a stream.
    """

    has_length = True

    def __init__(self, name: str, label_names: list[str] | None = None, skipped: Iterable[Unreadable] = ()) -> None:
        self.name, self.label_names, self.skipped = name, label_names, list(skipped)

    @property
    def num_classes(self) -> int | None:
        """The number of labels; None for unconditional training."""
        return None if self.label_names is None else len(self.label_names)

    def __len__(self) -> int:
        raise TypeError(f"{self.name} is a stream, of unknown length.")

    @abstractmethod
    def batches(self, first: int, size: int, stride: int, seed: int) -> Iterator[Batch]:
        """Endless batches: batch k holds images first + k·stride … first + k·stride + size - 1 of the sequence.

        The sequence is a function of `seed` alone: each epoch holds each image once, in an order of its own. So a run
        that resumes within an epoch sees the images that it would have seen. Rank r of P processes with batches of B
        starts at r·B with stride P·B.
        """

    @abstractmethod
    def sample(self, count: int, seed: int) -> Tensor:
        """The first `count` images of the sequence, or all of them if there are fewer: (n, C, H, W) as in `Batch`."""


class IndexedImages(Images):
    """Images that can be read in any order, by their indices below `length`."""

    length: int

    def __len__(self) -> int:
        return self.length

    @abstractmethod
    def read(self, requests: Iterable[np.ndarray]) -> Iterator[Batch]:
        """The batches of these indices, in the order of the requests."""

    def batches(self, first: int, size: int, stride: int, seed: int) -> Iterator[Batch]:
        """See `Images.batches`."""
        return self.read(self.indices(first + k * stride, size, seed) for k in count())

    def sample(self, count: int, seed: int) -> Tensor:
        """See `Images.sample`."""
        return next(self.read([self.indices(0, min(count, len(self)), seed)])).pixels

    def indices(self, first: int, size: int, seed: int) -> np.ndarray:
        """The indices of images first … first + size - 1 of the sequence, int64."""
        epochs, places = np.divmod(np.arange(first, first + size), len(self))
        return np.concatenate([_epoch_order(len(self), seed, int(e))[places[epochs == e]] for e in np.unique(epochs)])


@lru_cache(maxsize=2)  # a batch may span the end of an epoch
def _epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


class StoredImages(IndexedImages):
    """Images in memory, or mapped into it: `pixels` is uint8 or uint16 (N, C, H, W), `labels` int64 (N,) or None."""

    def __init__(
        self,
        pixels: Tensor,
        name: str,
        labels: Tensor | None = None,
        label_names: list[str] | None = None,
        skipped: Iterable[Unreadable] = (),
    ) -> None:
        super().__init__(name, label_names, skipped)
        self.pixels, self.labels, self.length = pixels, labels, len(pixels)

    def read(self, requests: Iterable[np.ndarray]) -> Iterator[Batch]:
        """See `IndexedImages.read`. A thread reads ahead: the pixels may have to come from a file."""
        remaining = iter(requests)
        with ThreadPoolExecutor(1) as thread:
            ahead = deque(thread.submit(self._read, indices) for indices in islice(remaining, BATCHES_AHEAD))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(thread.submit(self._read, indices) for indices in islice(remaining, 1))
                yield batch

    def _read(self, request: np.ndarray) -> Batch:
        indices = torch.from_numpy(request)
        labels = None if self.labels is None else self.labels[indices]
        return Batch(self.pixels.index_select(0, indices), labels)  # ten times faster than pixels[indices]


class DecodedImages(IndexedImages):
    """Images that are decoded each time they are needed, by worker processes: those that `survey` found readable."""

    def __init__(self, source: Source, transform: Transform, survey: Survey, workers: int) -> None:
        super().__init__(source.name, source.label_names, survey.unreadable)
        self.decoder, self.readable, self.workers = partial(decode_rows, source, transform), survey.readable, workers
        self.length = len(self.readable)

    def read(self, requests: Iterable[np.ndarray]) -> Iterator[Batch]:
        """See `IndexedImages.read`.

        Raises:
            ValueError: for an image that can't be read.
        """
        for decoded in decode_batches(self.decoder, (self.readable[r].tolist() for r in requests), self.workers):
            if decoded.unreadable:
                raise decoded.unreadable[0].error(self.name)
            yield Batch(decoded.pixels, decoded.labels)


class StreamedImages(Images):
    """Images that are read one after the other and never held all at once."""

    has_length = False

    def __init__(self, stream: Stream, transform: Transform, skip_unreadable: bool, workers: int) -> None:
        super().__init__(stream.name, stream.label_names)
        self.stream, self.transform, self.workers = stream, transform, workers
        self.skip_unreadable = skip_unreadable

    def batches(self, first: int, size: int, stride: int, seed: int) -> Iterator[Batch]:
        """See `Images.batches`. Every process reads the whole stream and decodes its own part of it.

        An image that can't be read is replaced by the next one that can.

        Raises:
            ValueError: for an image that can't be read, unless they are skipped; if no image of a batch can be read.
        """
        rows = self.stream.rows(first, seed)
        requests = _windows(rows, size + (SPARE_ROWS if self.skip_unreadable else 0), stride)
        for decoded in decode_batches(partial(decode_stream_rows, self.transform, size), requests, self.workers):
            if decoded.unreadable:
                self._note(decoded.unreadable, left=len(decoded.pixels))
            places = torch.arange(size) % len(decoded.pixels)
            yield Batch(decoded.pixels[places], None if decoded.labels is None else decoded.labels[places])

    def sample(self, count: int, seed: int) -> Tensor:
        """See `Images.sample`."""
        return next(self.batches(0, count, count, seed)).pixels

    def _note(self, unreadable: list[Unreadable], left: int) -> None:
        if not self.skip_unreadable or not left:
            raise unreadable[0].error(self.name)
        known = {bad.path for bad in self.skipped if bad.path}
        self.skipped += [bad for bad in unreadable if bad.path not in known]


def load_images(config: TrainConfig, source: Source | Stream | None = None, show_progress: bool = True) -> Images:
    """The training set of a configuration: mapped from a cache of decoded images, decoded on the fly, or streamed.

    All processes of a run may call it at the same time: one process of each machine builds the cache, the others wait.

    Args:
        source: the result of `open_source` or `open_stream` for this configuration, if there is one already.

    Raises:
        ValueError: for a source that does not exist, lacks the column, or holds no images; for damaged images.
        OSError: if the cache can't be written.
    """
    skip, workers = config.on_bad_image == "skip", config.dataloader_num_workers
    transform = transform_of(config)
    if source is None:
        source = open_stream(config) if config.streaming else open_source(config)
    if isinstance(source, Stream):
        return StreamedImages(source, transform, skip, workers)
    if source.fingerprint is None:
        decoded = decode_rows(source, transform, range(len(source)))
        return StoredImages(decoded.pixels, source.name, decoded.labels, source.label_names)
    root = cache_root(config.cache_dir)
    cache = choose_cache(root, source, transform, config.cache_limit_gb)
    is_kept = cache is not None
    if cache is None:  # which images can be read does not depend on a seed
        cache = ImageCache(root, source, replace(transform, crop_seed=None), keep_pixels=False)
    # Without a cache, only skipping needs a survey: the order of the images depends on how many can be read.
    survey = cache.build(skip, show_progress) if is_kept or skip else Survey(len(source))
    if survey.unreadable and show_progress:
        write(
            f"Skipping {len(survey.unreadable)} of {len(source)} images of {source.name}, which can't be read: "
            f"{survey.unreadable[0].path or survey.unreadable[0].index} is the first, all are in "
            f"{cache.folder / 'cache.json'}."
        )
    if not is_kept:
        return DecodedImages(source, transform, survey, workers)
    labels = None if source.labels is None else torch.from_numpy(source.labels[survey.readable])
    pixels = torch.from_numpy(cache.pixels(survey))
    return StoredImages(pixels, source.name, labels, source.label_names, survey.unreadable)


def transform_of(config: TrainConfig) -> Transform:
    """The transform of a configuration."""
    return Transform(
        config.resolution,
        str(config.image_mode),
        config.resize,
        None if config.center_crop else config.seed,
        config.preserve_input_precision,
    )


def _windows(rows: Iterator[StreamRow], size: int, stride: int) -> Iterator[list[StreamRow]]:
    """Lists of `size` consecutive rows, starting `stride` rows apart."""
    window: deque[StreamRow] = deque()
    while True:
        window.extend(islice(rows, size - len(window)))
        yield list(window)
        for _ in range(stride):
            if window:
                window.popleft()
            else:
                next(rows)
