"""Interrupted runs: SIGTERM, SIGUSR1 and Ctrl-C wait for the end of an update, and stop all processes together."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Self

from ..distributed import Agreement

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))  # not on Windows
# The launcher passes on a Ctrl-C that its processes have already received from the terminal.
ECHO_SECONDS = 2.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0


class Interrupted(Exception):  # noqa: N818  (not an error)
    """A signal ended the run."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.signum = signum


class Interruption:
    """Within this context, SIGTERM, SIGUSR1 and Ctrl-C wait for the next `check`; a second one exits immediately."""

    def __init__(self, agreement: Agreement) -> None:
        self.agreement = agreement
        self.signum = 0
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            self._previous = {signum: signal.signal(signum, self._receive) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.signum:
            self.signum, self._since = signum, time.monotonic()
            if os.environ.get("RANK", "0") == "0":  # os.write, since a print may be in progress
                os.write(
                    2, b"\nStopping after this update, with a checkpoint. Press Ctrl-C again to exit immediately.\n"
                )
        elif time.monotonic() - self._since >= ECHO_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def check(self) -> None:
        """Raise Interrupted in all processes if any has received a signal. All of them must call it."""
        self.check_and_agree()

    def check_and_agree(self, *values: float) -> list[float]:
        """The same, with numbers of which all processes get the largest: one message serves for both."""
        signum, *agreed = self.agreement.largest_of_each(self.signum, *values)
        if signum:
            raise Interrupted(int(signum))
        return agreed
