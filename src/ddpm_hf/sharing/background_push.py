"""Pushing checkpoints while training goes on."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.auto import tqdm

from .card import CardFacts
from .hub import DELAYS, HubTarget, Log, PushError
from .push import STAGE, failure_text, is_shared, push_export


class BackgroundPusher:
    """Pushes checkpoints while training goes on: `submit` returns at once, and only the latest one waiting goes up.

    Use it in a `with` block, around the training loop. Its end waits for the push under way; where an exception ends
    the loop, it does not wait for a Hub that can't be reached. No failure of a push leaves this class.

    Args:
        target: with the full name of a repository, as `check_push_access` returns it.

    Raises:
        ValueError: for a name without its owner.
    """

    def __init__(self, target: HubTarget, *, log: Log = tqdm.write, delays: tuple[float, ...] = DELAYS) -> None:
        if "/" not in target.repo_id:
            raise ValueError(f"`repo_id` is {target.repo_id!r}, but must be the full name, owner/name.")
        self._target, self._log, self._delays = target, log, delays
        self._changed = threading.Condition()
        self._waiting: tuple[Path, Path, CardFacts | None] | None = None  # the copy to push, what it is of, its facts
        self._cleared: set[Path] = set()
        self._closing = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._run, name="push-to-hub", daemon=True)
        self._thread.start()

    def submit(self, checkpoint: Path, facts: CardFacts | None = None) -> None:
        """Push a checkpoint, or any saved pipeline, which may be removed as soon as this returns."""
        try:
            self._remove_leftovers(checkpoint.parent)
            copy = _link_files(checkpoint)
        except OSError as error:
            self._log(f"{checkpoint} was not pushed: {error}")
            return
        with self._changed:
            if self._waiting is not None:
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = copy, checkpoint, facts
            self._changed.notify()

    def _remove_leftovers(self, run: Path) -> None:
        """Remove, once, the copies that a run which was killed has left."""
        if run not in self._cleared:
            self._cleared.add(run)
            for leftover in run.glob(f"{STAGE}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def close(self) -> None:
        """Wait until what was submitted is on the Hub, or can't be."""
        self._closing.set()
        with self._changed:
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> BackgroundPusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._hurry.set()
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._waiting is None and not self._closing.is_set():
                    self._changed.wait()
                if self._waiting is None:
                    return
                (copy, checkpoint, facts), self._waiting = self._waiting, None
            self._push(copy, checkpoint, facts)

    def _push(self, copy: Path, checkpoint: Path, facts: CardFacts | None) -> None:
        shows_bars = not are_progress_bars_disabled()
        disable_progress_bars()  # they would tear the bar of the training apart
        message = f"Upload DDPM, {checkpoint.name}"
        delays = () if self._hurry.is_set() else self._delays
        try:
            push_export(copy, self._target, facts, message, self._log, delays, self._sleep)
        except Exception as error:
            self._log(failure_text(error, checkpoint.parent, self._target))
        finally:
            if shows_bars:
                enable_progress_bars()
            shutil.rmtree(copy, ignore_errors=True)

    def _sleep(self, seconds: float) -> None:
        if self._hurry.wait(seconds):
            raise PushError("training has ended before the Hub could be reached.")


def _link_files(folder: Path) -> Path:
    """A copy of what a saved pipeline shares, beside it: hard links where the disk has them."""
    copy = Path(tempfile.mkdtemp(prefix=STAGE, dir=folder.parent))
    try:
        for file in folder.rglob("*"):
            name = file.relative_to(folder)
            if not file.is_file() or not is_shared(name.as_posix()):
                continue
            (copy / name).parent.mkdir(exist_ok=True)
            try:
                if name.suffix != ".safetensors":  # what is small may be written to here
                    raise OSError
                os.link(file, copy / name)
            except OSError:
                shutil.copyfile(file, copy / name)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy
