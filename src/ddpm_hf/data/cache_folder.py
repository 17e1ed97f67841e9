"""All caches of decoded images below a folder: what they are of, and how they are removed."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..storage.files import describe_bytes, is_shared, read_json
from .cache import ABOUT, SQUARE, read_survey

FILES = re.compile(
    rf"cache\.json|{re.escape(ABOUT)}|{SQUARE}|lock|(progress|pixels)[-\w]*\.(json|bin)|.*\.json\.partial"
)


@dataclass(frozen=True)
class CacheEntry:
    """A cache on the disk."""

    folder: Path
    description: str
    size: int  # in bytes
    last_used: float  # in seconds since 1970
    is_complete: bool

    def __str__(self) -> str:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.last_used))
        state = "complete" if self.is_complete else "partial"
        return f"{describe_bytes(self.size):>10}  {state:8}  {used}  {self.description}  {self.folder}"


def list_caches(root: Path) -> list[CacheEntry]:
    """The caches in a folder, the one that was used last first. Other folders there are left out."""
    names = re.compile(r"[0-9a-f]{24}")
    folders = [p for p in root.glob("*") if names.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(map(_describe, folders), key=lambda entry: -entry.last_used)


def remove_cache(folder: Path) -> bool:
    """Remove the files of a cache, and its folder, unless a run is building it or has mapped its pixels.

    Of machines that share the disk but not their locks, only this one's runs are known.

    Returns:
        Whether it was removed.

    Raises:
        OSError: where it may not be removed.
    """
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        files = [file for file in folder.iterdir() if FILES.fullmatch(file.name) and file.name != "lock"]
        if any(is_shared(file) for file in files if file.suffix == ".bin"):
            return False
        for file in sorted(files):  # cache.json before the pixels: without it, they are no cache
            file.unlink(missing_ok=True)
    finally:
        lock.release()
    with suppress(OSError):  # somebody else's file is in it, or a run that has waited for the lock builds it anew
        (folder / "lock").unlink(missing_ok=True)
        folder.rmdir()
    return True


def _describe(folder: Path) -> CacheEntry:
    try:
        about = read_json(folder / ABOUT)
        description, image_bytes = str(about["description"]), int(about["image_bytes"])
    except (OSError, ValueError, TypeError, KeyError):
        description, image_bytes = "made by an earlier version", 0
    states = [file.stat() for file in folder.iterdir() if FILES.fullmatch(file.name) and file.name != "lock"]
    used = max((state.st_mtime for state in states), default=folder.stat().st_mtime)
    is_complete = read_survey(folder / "cache.json", image_bytes) is not None
    return CacheEntry(folder, description, sum(state.st_size for state in states), used, is_complete)
