"""Training images: any source → uint8 batches in an order that is a function of progress → [-1, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .cache import ImageCache, cache_root, fits_disk
from .decoding import decode_batches, decode_rows, decode_stream_rows
from .sources import Source, Stream, StreamRow, open_source, open_stream
from .transform import Transform, Unreadable

if TYPE_CHECKING:
    from ..config.training import TrainConfig

SPARE_ROWS = 8  # of a stream, beyond a batch, to take the place of images that can't be read


class Batch(NamedTuple):
    """`pixels` is uint8, or uint16 where 16 bits are kept, of shape (B, C, H, W); `labels` int64 of shape (B,)."""

    pixels: Tensor
    labels: Tensor | None


class Images(ABC):
    """A training set: an endless, shuffled stream of images, from any place of which one can go on.

    Attributes:
        name: that of the source, for messages.
        label_names: what the labels 0 … n - 1 are called; None for unconditional training.
        skipped: what `--on_bad_image skip` has left out. A stream finds it out by and by.
        has_length: whether `len()` gives the number of images; that of a stream is not known.
    """

    has_length = True

    def __init__(self, name: str, label_names: list[str] | None = None, skipped: Iterable[Unreadable] = ()) -> None:
        self.name, self.label_names, self.skipped = name, label_names, list(skipped)

    @property
    def num_classes(self) -> int | None:
        """The number of labels; None for unconditional training."""
        return None if self.label_names is None else len(self.label_names)

    def __len__(self) -> int:
        raise TypeError(f"how many images {self.name} holds is not known before its end.")

    @abstractmethod
    def batches(self, first: int, size: int, stride: int, seed: int) -> Iterator[Batch]:
        """Endless: batch k holds images number first + k·stride … first + k·stride + size - 1 of the stream.

        The stream is a function of `seed` alone: epoch after epoch, each image once per epoch, each epoch in its own
        order. So a run that goes on in the middle of an epoch sees what it would have seen. Rank r of P processes with
        batches of B starts at r·B and strides P·B.
        """

    @abstractmethod
    def sample(self, count: int, seed: int) -> Tensor:
        """The first `count` images of the stream, or all of them if there are fewer: (n, C, H, W) as in `Batch`."""


class IndexedImages(Images):
    """Images that can be read in any order. `read` maps arrays of indices below `length` to batches."""

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
        """What images number first … first + size - 1 of the stream are, int64."""
        epochs, places = np.divmod(np.arange(first, first + size), len(self))
        return np.concatenate([self._order(seed, int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of one epoch; the latest is kept."""
        if getattr(self, "_latest", (None,))[0] != (seed, epoch):
            self._latest = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self))
        return self._latest[1]


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
        """See `IndexedImages.read`."""
        for indices in map(torch.from_numpy, requests):
            labels = None if self.labels is None else self.labels[indices]
            yield Batch(self.pixels.index_select(0, indices), labels)  # ten times as fast as an index


class DecodedImages(IndexedImages):
    """Images that are decoded each time they are needed, by worker processes: `readable` are their indices."""

    def __init__(
        self, source: Source, transform: Transform, readable: np.ndarray, skipped: Iterable[Unreadable], workers: int
    ) -> None:
        super().__init__(source.name, source.label_names, skipped)
        self.decoder, self.readable, self.workers = partial(decode_rows, source, transform), readable, workers
        self.length = len(readable)

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
    """Images that are read one after the other, and never all there."""

    has_length = False

    def __init__(self, stream: Stream, transform: Transform, skip_unreadable: bool, workers: int) -> None:
        super().__init__(stream.name, stream.label_names)
        self.stream, self.transform, self.workers = stream, transform, workers
        self.skip_unreadable = skip_unreadable

    def batches(self, first: int, size: int, stride: int, seed: int) -> Iterator[Batch]:
        """See `Images.batches`. Every process reads the whole stream, and decodes its own part of it.

        The place of an image that can't be read is taken by the next one that can.

        Raises:
            ValueError: for an image that can't be read, unless they are skipped; if all of a batch can't be read.
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

    All processes of a run may call it at the same time: one of each machine builds the cache, the others wait for it.

    Args:
        source: what `open_source` or `open_stream` has opened for this configuration already.

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
    cache = ImageCache(cache_root(config), source, transform)
    keep = config.cache_limit_gb != 0 and (cache.load() is not None or fits_disk(cache, config.cache_limit_gb))
    if not keep and not skip:
        return DecodedImages(source, transform, np.arange(len(source)), [], workers)
    if not keep:  # which images to skip must be known before the order of the others is
        cache = ImageCache(cache_root(config), source, transform, keep_pixels=False)
    survey = cache.build(skip, show_progress)
    if survey.unreadable and show_progress:
        tqdm.write(
            f"{len(survey.unreadable)} of {len(source)} images of {source.name} can't be read and are left out, "
            f"first {survey.unreadable[0].path or survey.unreadable[0].index}: see {cache.folder / 'cache.json'}"
        )
    if not keep:
        return DecodedImages(source, transform, survey.readable, survey.unreadable, workers)
    labels = None if source.labels is None else torch.from_numpy(source.labels[survey.readable])
    pixels = torch.from_numpy(cache.pixels(survey))
    return StoredImages(pixels, source.name, labels, source.label_names, survey.unreadable)


def transform_of(config: TrainConfig) -> Transform:
    """What a configuration does to every image."""
    return Transform(
        config.resolution,
        str(config.image_mode),
        config.resize,
        None if config.center_crop else config.seed,
        config.preserve_input_precision,
    )


def _windows(rows: Iterator[StreamRow], size: int, stride: int) -> Iterator[list[StreamRow]]:
    """Lists of `size` rows that start `stride` rows apart."""
    window: deque[StreamRow] = deque()
    while True:
        window.extend(islice(rows, size - len(window)))
        yield list(window)
        for _ in range(stride):
            if window:
                window.popleft()
            else:
                next(rows)
