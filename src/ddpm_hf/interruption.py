"""Ends of a run that nobody planned: SIGTERM, Ctrl-C, and errors of one process that the others have to know."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The launcher passes on a Ctrl-C that its processes have got from the terminal already.
ECHO_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class Interrupted(Exception):  # noqa: N818  (not an error)
    """The run was asked to end by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Agreement:
    """What any process wants, all do: a maximum over the processes that costs the GPU nothing."""

    def __init__(self, num_processes: int) -> None:
        self.group = dist.new_group(backend="gloo") if num_processes > 1 else None

    def largest(self, value: int) -> int:
        """The largest value of all processes. All of them must call it."""
        if self.group is None:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared)

    def same(self, value: int) -> bool:
        """Whether the value is the same in all processes. All of them must call it."""
        return self.largest(value) == -self.largest(-value)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A foreseen error (ValueError, OSError) of one process within this context is raised in all at its end.

        All of them must enter it, and wait for no other within.
        """
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        if self.largest(int(failure is not None)):
            raise failure or RuntimeError("another process failed; its message says why.")


class Interruption:
    """Within this context, SIGTERM and Ctrl-C wait until `check` is called; a second one ends the process at once."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.signum = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            self._previous = {signum: signal.signal(signum, self._notice) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _notice(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # os.write, because a print may be under way
                os.write(2, b"\nEnding after this update, with a checkpoint. Once more ends at once.\n")
        elif time.monotonic() - self._since >= ECHO_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def check(self) -> None:
        """Raise Interrupted in all processes if any has got a signal. All of them must call it."""
        signum = self.agreement.largest(self.signum)
        if signum:
            raise Interrupted(signum)
