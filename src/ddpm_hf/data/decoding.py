"""Many images: rows of a source → stacked arrays, by worker processes where that pays."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import islice
from multiprocessing import RawValue, parent_process
from typing import Any, NamedTuple, TypeVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .sources import Source, StreamRow
from .transform import Transform, Unreadable, decode

AHEAD = 2  # requests per worker that are decoded before they are needed


class Decoded(NamedTuple):
    """The images of one request: uint8 or uint16 of shape (n, C, H, W), their labels (n,), and what can't be read."""

    pixels: Tensor
    labels: Tensor | None
    unreadable: list[Unreadable]


Decoder = Callable[[Any], Decoded]
Row = TypeVar("Row")


def decode_rows(source: Source, transform: Transform, indices: Sequence[int]) -> Decoded:
    """The readable images among these indices of a source."""
    rows = zip(indices, source.read(indices), strict=True)
    results = [decode(*row, transform) for row in _until_stopped(rows)]
    return _stack(results, None if source.labels is None else source.labels[indices], transform)


def decode_stream_rows(transform: Transform, size: int, rows: Sequence[StreamRow]) -> Decoded:
    """The first `size` readable images among these rows of a stream."""
    results: list[np.ndarray | Unreadable] = []
    for row in _until_stopped(rows):
        result = decode(_content_number(row.raw), row.raw, transform)
        results.append(replace(result, index=row.position) if isinstance(result, Unreadable) else result)
        if sum(isinstance(r, np.ndarray) for r in results) == size:
            break
    has_labels = rows[0].label is not None
    labels = np.array([row.label for row in rows[: len(results)]], np.int64) if has_labels else None
    return _stack(results, labels, transform)


def decode_batches(decoder: Decoder, requests: Iterable[Any], workers: int) -> Generator[Decoded]:
    """`decoder` of each request, in order, by `workers` processes (0: by this one).

    Raises:
        RuntimeError: where a worker process was killed.
    """
    if not workers:
        yield from map(decoder, requests)
        return
    # DataLoader would do, but has no public way to end its workers, and they have to outlive signals (see below).
    stopped = RawValue("b", 0)
    executor = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(decoder, stopped))
    coming, pending = iter(requests), deque[Future[Decoded]]()
    try:
        while True:
            for request in islice(coming, AHEAD * workers - len(pending)):
                pending.append(executor.submit(_decode_in_worker, request))
            if not pending:
                return
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process that decodes images was killed (out of memory?): lower --dataloader_num_workers."
        ) from error
    finally:
        stopped.value = 1
        executor.shutdown(cancel_futures=True)


def _start_worker(decoder: Decoder, stopped: Any) -> None:
    """Set up a worker process: only the run decides when to stop, and its workers end with it, even if it is killed.

    Ctrl-C is sent to every process of a terminal, SIGTERM to every process of a job, so the workers ignore both.
    """
    global _decoder, _stopped
    _decoder, _stopped = decoder, stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _decode_in_worker(request: Any) -> Decoded:
    return _decoder(request)


def _until_stopped(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, as long as the results are wanted: the request of a worker process may take many seconds."""
    for row in rows:
        if _stopped is not None and _stopped.value:
            raise RuntimeError("the results are not wanted any more")
        yield row


# Of a worker process, which gets them once, when it starts.
_decoder: Decoder
_stopped: Any = None


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
