"""Pushing checkpoints while training continues."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from ..progress import write
from .card import CardFacts
from .hub import HubTarget, PushError, Retry
from .push import STAGE, failure_text, files_of, is_shared, push_export

BESIDE_A_PROGRESS_BAR = Retry(log=write)


class BackgroundPusher:
    """Pushes checkpoints while training continues: `submit` returns at once, and replaces a checkpoint still waiting.

    Use it in a `with` block around the training loop. Leaving the block waits for the push under way, but when an
    exception ends the loop, not for a Hub that can't be reached. A failed push is logged and never raised.

    Args:
        target: with the full name of a repository, as `check_push_access` returns it.
        retry: its `log` takes failures, too; its `sleep` is not used.

    Raises:
        ValueError: for a name without its owner.
    """

    def __init__(self, target: HubTarget, retry: Retry = BESIDE_A_PROGRESS_BAR) -> None:
        if "/" not in target.repo_id:
            raise ValueError(f"`repo_id` is {target.repo_id!r}, but must be the full name, owner/name.")
        self._target, self._retry = target, replace(retry, sleep=self._sleep)
        # Not HfApi.run_as_future: its worker thread can't be waited for.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-to-hub")
        self._latest: Future[None] | None = None
        self._hurry = threading.Event()
        self._cleared: set[Path] = set()

    def submit(self, checkpoint: Path, facts: CardFacts | None = None) -> None:
        """Push a checkpoint, or any saved pipeline. It may be deleted as soon as this returns."""
        try:
            self._remove_leftovers(checkpoint.parent)
            copy = _link_files(checkpoint)
        except OSError as error:
            self._retry.log(f"{checkpoint} was not pushed: {error}")
            return
        if self._latest is not None:
            self._latest.cancel()  # unless it has started
        self._latest = self._executor.submit(self._push, copy, checkpoint, facts)
        self._latest.add_done_callback(lambda _: shutil.rmtree(copy, ignore_errors=True))

    def _remove_leftovers(self, run: Path) -> None:
        """Remove, once, the copies that a killed run has left."""
        if run not in self._cleared:
            self._cleared.add(run)
            for leftover in run.glob(f"{STAGE}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def __enter__(self) -> BackgroundPusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._hurry.set()
        self._executor.shutdown()

    def _push(self, copy: Path, checkpoint: Path, facts: CardFacts | None) -> None:
        shows_bars = not are_progress_bars_disabled()
        disable_progress_bars()  # they would break up the training's own
        try:
            push_export(copy, self._target, facts, f"Upload DDPM, {checkpoint.name}", self._retry)
        except Exception as error:
            self._retry.log(failure_text(error, checkpoint.parent, self._target))
        finally:
            if shows_bars:
                enable_progress_bars()

    def _sleep(self, seconds: float) -> None:
        if self._hurry.wait(seconds):
            raise PushError("training ended before the Hub could be reached.")


def _link_files(folder: Path) -> Path:
    """A copy of the files of a saved pipeline that are shared, beside it: hard links where the disk has them."""
    copy = Path(tempfile.mkdtemp(prefix=STAGE, dir=folder.parent))
    try:
        for name, file in files_of(folder).items():
            if is_shared(name):
                (copy / name).parent.mkdir(exist_ok=True)
                # Small files are copied, because the card is rewritten.
                link = os.link if file.suffix == ".safetensors" else shutil.copyfile
                try:
                    link(file, copy / name)
                except OSError:
                    shutil.copyfile(file, copy / name)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy
