"""Progress: a bar in a terminal and in notebooks; elsewhere, in a log, a line from time to time.

TQDM_DISABLE=1 turns it off, and TQDM_MININTERVAL=60 makes it a line every minute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import tqdm.asyncio
import tqdm.auto
from tqdm.std import tqdm as Bar  # noqa: N812

SECONDS_PER_LINE = 10.0
LINE = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines(Bar):
    """A progress bar of tqdm that prints a line at times, and one at its end, where nothing can be redrawn."""

    @staticmethod
    def status_printer(file: Any) -> Any:
        """What prints a status: as a line."""

        def write_line(status: str) -> None:
            file.write(f"{status}\n")
            file.flush()

        return write_line

    def moveto(self, n: int) -> None:
        """Nothing, since there is no line to move to."""

    def clear(self, nolock: bool = False) -> None:
        """Nothing, since what is printed stays."""

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """Print the status, but not only because something else was printed."""
        if not nolock:
            super().refresh(lock_args=lock_args)

    def close(self) -> None:
        """Print the last status, unless the bar would have been removed."""
        if self.disable:
            return
        self.disable = True
        self._decr_instances(self)  # type: ignore[attr-defined]
        if self.leave:
            self.display()


def progress(
    iterable: Iterable[Any] | None = None, *, desc: str, unit: str, total: int | None = None, is_shown: bool = True,
    **options: Any,
) -> Bar[Any]:  # fmt: skip
    """A progress bar, or lines of progress where there is no terminal.

    Args:
        iterable: what is counted; without it, call `update`.
        is_shown: False makes a bar that shows nothing.
        options: of tqdm.
    """
    if not is_shown:
        options["disable"] = True  # otherwise left to TQDM_DISABLE
    in_notebook = tqdm.auto.tqdm is not tqdm.asyncio.tqdm
    if in_notebook or _in_terminal():
        return tqdm.auto.tqdm(iterable, desc=desc, total=total, unit=unit, **options)
    pause = float(os.environ.get("TQDM_MININTERVAL", SECONDS_PER_LINE))
    options |= {"mininterval": pause, "delay": pause, "miniters": 1, "bar_format": LINE}
    return _Lines(iterable, desc=desc, total=total, unit=unit, **options)


def _in_terminal() -> bool:
    """Whether there is a terminal to redraw a bar in: one without a size, as in some containers, would show none."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # unknown
        return True


def write(text: str) -> None:
    """Print text beside a progress bar, without breaking it."""
    Bar.write(text)
