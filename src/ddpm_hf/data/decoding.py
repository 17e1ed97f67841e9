"""Many images: rows of a source → stacked arrays, in worker processes where that pays."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .sources import Source, StreamRow
from .transform import Transform, Unreadable, decode


class Decoded(NamedTuple):
    """The images of one request: uint8 or uint16 of shape (n, C, H, W), their labels (n,), and what can't be read."""

    pixels: Tensor
    labels: Tensor | None
    unreadable: list[Unreadable]


@dataclass(frozen=True)
class RowDecoder(Dataset):
    """Decodes lists of indices of a source."""

    source: Source
    transform: Transform

    def __getitems__(self, indices: list[int]) -> Decoded:
        """The images of these indices that can be read. DataLoader calls it."""
        results = [decode(*row, self.transform) for row in zip(indices, self.source.read(indices), strict=True)]
        labels = None if self.source.labels is None else self.source.labels[indices]
        return _stack(results, labels, self.transform)


@dataclass(frozen=True)
class StreamDecoder(Dataset):
    """Decodes lists of rows of a stream: of each list the first `size` that can be read."""

    transform: Transform
    size: int

    def __getitems__(self, rows: list[StreamRow]) -> Decoded:
        """The first `size` readable images of these rows. DataLoader calls it."""
        results: list[np.ndarray | Unreadable] = []
        for row in rows:
            result = decode(_content_number(row.raw), row.raw, self.transform)
            results.append(replace(result, index=row.position) if isinstance(result, Unreadable) else result)
            if sum(isinstance(r, np.ndarray) for r in results) == self.size:
                break
        has_labels = rows[0].label is not None
        labels = np.array([row.label for row in rows[: len(results)]], np.int64) if has_labels else None
        return _stack(results, labels, self.transform)


def decode_batches(
    decoder: RowDecoder | StreamDecoder, requests: Iterable[Sequence[Any]], workers: int
) -> Iterator[Decoded]:
    """The answers to `requests`, in their order, by so many worker processes (0: by this one)."""
    answers = _answers(decoder, requests, workers)
    if workers:  # a traceback may hold them until the process ends, which would wait for its workers for ever
        atexit.register(_close, weakref.ref(answers))
    return answers


def _answers(
    decoder: RowDecoder | StreamDecoder, requests: Iterable[Sequence[Any]], workers: int
) -> Generator[Decoded, None, None]:
    loader = DataLoader(
        decoder,
        batch_sampler=requests,  # type: ignore[arg-type]  # any iterable of lists will do
        num_workers=workers,
        collate_fn=_unchanged,  # the images of a request come stacked
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # from the global one, DataLoader would draw numbers that belong to the run
    )
    answers = iter(loader)
    try:
        yield from answers
    finally:
        if workers:
            answers._shutdown_workers()  # type: ignore[attr-defined]  # DataLoader has no public way


def _close(answers: weakref.ref[Generator[Decoded, None, None]]) -> None:
    generator = answers()
    if generator is not None:
        generator.close()


def _stack(results: list[np.ndarray | Unreadable], labels: np.ndarray | None, transform: Transform) -> Decoded:
    readable = [i for i, result in enumerate(results) if isinstance(result, np.ndarray)]
    pixels = np.empty((len(readable), *transform.shape), transform.dtype)
    for place, i in enumerate(readable):
        pixels[place] = results[i]
    return Decoded(
        torch.from_numpy(pixels),
        None if labels is None else torch.from_numpy(labels[readable]),
        [result for result in results if isinstance(result, Unreadable)],
    )


def _content_number(raw: Any) -> int:
    """The index of an image where rows have none: a checksum of its bytes, else of its path."""
    if raw is None:
        return 0
    return crc32(raw["bytes"] if raw["bytes"] is not None else str(raw["path"]).encode())


def _unchanged(decoded: Any) -> Any:
    return decoded


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal, SIGTERM those of a job: the training process decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
