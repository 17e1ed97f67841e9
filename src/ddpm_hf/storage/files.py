"""Files and folders on disk: atomic writes, locks, and the checks that come before the work."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    pass


def check_writable(folder: Path) -> None:
    """Raise a ValueError unless the folder is there, or can be made, and takes files. Leaves nothing behind."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` {str(folder)!r} can't be written to ({error}): choose another one.") from error


def write_atomically(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file: whenever this process ends, there is what was there before, or the new one whole."""
    unfinished = file.with_name(f"{file.name}.partial")
    with unfinished.open("wb") as stream:
        write(stream)
    unfinished.replace(file)


def write_text_atomically(file: Path, text: str) -> None:
    """Write a text file in the same way."""
    write_atomically(file, lambda stream: stream.write(text.encode()))


def lock_output_dir(output_dir: Path) -> FileLock:
    """Make the folder, and keep other runs out of it until the lock is released or this process has ended.

    Raises:
        ValueError: where another run is at work there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another run is writing into `output_dir` {str(output_dir)!r}: wait for it, or choose another one."
        ) from None
    return lock


def check_space(output_dir: Path, checkpoint_bytes: int) -> None:
    """Raise a ValueError unless the disk has room for a checkpoint while the one before is still there."""
    there = next(place for place in (output_dir, *output_dir.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < 2 * checkpoint_bytes:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} is on a disk with {free / 2**20:,.0f} MiB free, but two checkpoints "
            f"take {checkpoint_bytes / 2**19:,.0f} MiB: free some, or choose another one."
        )
