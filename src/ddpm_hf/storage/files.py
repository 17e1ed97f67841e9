"""Files and folders on disk: atomic writes, locks, and the checks that come before the work."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}  # Windows has no EDQUOT
MAX_JSON_BYTES = 100_000_000
REMEDY = "Free some space, or choose another folder."


def check_writable(folder: Path, option: str = "output_dir") -> None:
    """Raise a ValueError unless files can be written into the folder, or it can be made. Leaves nothing behind.

    Args:
        option: whose value leads to the folder.
    """
    try:
        with tempfile.TemporaryFile(dir=_nearest_existing(folder)):
            pass
    except OSError as error:
        raise ValueError(f"`{option}` {str(folder)!r} can't be written to ({error}): choose another one.") from error


def check_free_space(output_dir: Path, num_bytes: int, contents: str) -> None:
    """Raise a ValueError unless the disk of a folder has room for these contents."""
    free = free_bytes(output_dir)
    if free < num_bytes:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} is on a disk with {describe_bytes(free)} free, but {contents} take "
            f"{describe_bytes(num_bytes)}: free some, or choose another --output_dir."
        )


def free_bytes(folder: Path) -> int:
    """Free space on the disk that the folder is on, or will be on."""
    return shutil.disk_usage(_nearest_existing(folder)).free


def describe_bytes(count: int) -> str:
    """A size for people, in MiB or GiB; in bytes below a MiB."""
    if count < 2**20:
        return f"{count:,} bytes"
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


@contextmanager
def full_disk_explained(place: Path, num_bytes: int | None = None, remedy: str = REMEDY) -> Iterator[None]:
    """Within this context, a disk that is full is an OSError that names the place, the room there is, and the remedy.

    Args:
        place: what is being written, or the folder that it lies in.
        num_bytes: what it takes, where that is known.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        codes = {error.errno} if isinstance(error, OSError) else {*map(int, re.findall(r"os error (\d+)", str(error)))}
        if not codes & FULL:
            if isinstance(error, OSError):
                raise
            raise OSError(f"{str(place)!r} can't be written: {error}") from error
        needed = "" if num_bytes is None else f", and {describe_bytes(num_bytes)} are needed"
        raise OSError(
            f"{str(place)!r} can't be written ({error}): {describe_bytes(free_bytes(place))} are free on its "
            f"disk{needed}. {remedy}"
        ) from error


def _nearest_existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def write_atomically(file: Path, write: Callable[[IO[bytes]], object], *, sync: bool = False) -> None:
    """Write a file under a temporary name, `*.partial`, and rename it: the old content stays until the new is complete.

    Args:
        write: gets the open file.
        sync: flush the content to the disk before the rename, so that it survives a power failure, too.

    Raises:
        OSError: where it can't be written, for example on a full disk. No temporary file is left.
    """
    partial = file.with_name(f"{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            write(stream)
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(file)  # which the system does not name where a disk is full
        raise


def write_text_atomically(file: Path, text: str) -> None:
    """`write_atomically` for text, in UTF-8."""
    write_atomically(file, lambda stream: stream.write(text.encode()))


def read_json(file: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file, which a stranger may have written.

    Raises:
        ValueError: for a file that is too large, is not JSON in UTF-8, or is nested too deep for the parser.
        OSError: if it can't be read.
    """
    size = file.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{str(file)!r} has {size:,} bytes, but such a file never has more than {max_bytes:,}.")
    try:
        return json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}).") from error


def sync(path: Path) -> None:
    """Flush a file or folder to the disk. Windows opens no folders, and syncs only files that are open for writing."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def share(file: IO[bytes]) -> None:
    """Mark an open file as in use, until it and mappings of it are closed. On Windows, every open file is."""
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):  # on a disk without locks
            fcntl.flock(file, fcntl.LOCK_SH)


def is_shared(file: Path) -> bool:
    """Whether some process has marked the file as in use."""
    if sys.platform == "win32":
        return False
    import fcntl

    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lock_output_dir(output_dir: Path, is_main: bool = True) -> AbstractContextManager[object]:
    """Make the folder, and lock other runs out of it until the end of the returned context, or of this process.

    Args:
        is_main: False does nothing, in the processes of a run that are not its main one.

    Raises:
        ValueError: if another run holds the lock.
    """
    if not is_main:
        return nullcontext()
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(output_dir / ".lock").acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another run is writing into `output_dir` {str(output_dir)!r}: wait for it, or choose another one."
        ) from None
