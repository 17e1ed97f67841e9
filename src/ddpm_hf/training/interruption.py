"""Ends of a run that nobody planned: SIGTERM, Ctrl-C, and errors of one process that the others have to know."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from ..distributed import Agreement

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# The launcher passes on a Ctrl-C that its processes have got from the terminal already.
ECHO_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class Interrupted(Exception):  # noqa: N818  (not an error)
    """The run was asked to end by a signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


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
