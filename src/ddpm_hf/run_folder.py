"""The output folder of a training run: whether it may be used, and how it is cleared and filled."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .checkpoint import BEST, check_whole, checkpoint_steps, latest_checkpoint, remove_checkpoint
from .pipeline import CODE_FILES, EVALUATION_FILES, DDPMPipelineCustom

if TYPE_CHECKING:
    from .config import TrainConfig

# What a run leaves in its folder, beside checkpoints and the logs: all that --overwrite_output_dir may remove.
PICTURES = ("samples.png", "real.png", "samples_and_real.png", "loss.png", "validation.png")
RUN_FILES = ("model_index.json", *CODE_FILES, *PICTURES, *EVALUATION_FILES, BEST)
RUN_FOLDERS = ("unet", "scheduler")
LOG_FILES = ("train.jsonl", "tracker_run", "skipped_images.json")


def prepare_output_dir(output_dir: Path, config: TrainConfig) -> tuple[Path | None, list[str]]:
    """Check, before any work, that the run can write to its folder.

    Returns:
        The checkpoint to resume from, if any, and why newer ones were skipped.

    Raises:
        ValueError: for a folder that can't be written or holds another run, and for a checkpoint that is not there.
    """
    check_writable(output_dir)
    for folder in [output_dir, output_dir / config.logging_dir, *(output_dir / name for name in RUN_FOLDERS)]:
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is no folder, but the run needs one there: move it away.")
    resume = config.resume_from_checkpoint
    if resume is None:
        _refuse_other_run(output_dir, config)
        return None, []
    if resume != "latest":
        checkpoint = Path(resume)
        if not checkpoint.is_dir() and len(checkpoint.parts) == 1:  # a bare name
            checkpoint = output_dir / checkpoint
        check_whole(checkpoint)
        if checkpoint.resolve().parent != output_dir.resolve():
            _refuse_other_run(output_dir, config)
        return checkpoint, []
    latest, skipped = latest_checkpoint(output_dir)
    if latest is None and (skipped or (output_dir / "model_index.json").exists()):
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but {str(output_dir)!r} has no whole checkpoint. "
            + " ".join(skipped)
        )
    return latest, skipped


def _refuse_other_run(output_dir: Path, config: TrainConfig) -> None:
    traces = (output_dir / "model_index.json", output_dir / config.logging_dir / "train.jsonl")
    if not config.overwrite_output_dir and (checkpoint_steps(output_dir) or any(t.exists() for t in traces)):
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds another run: go on with --resume_from_checkpoint latest, "
            "replace it with --overwrite_output_dir, or choose another --output_dir."
        )


def check_writable(folder: Path) -> None:
    """Raise a ValueError unless the folder is there, or can be made, and takes files. Leaves nothing behind."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` {str(folder)!r} can't be written to ({error}): choose another one.") from error


def write_whole(file: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file: whenever this process ends, there is what was there before, or the new one whole."""
    unfinished = file.with_name(f"{file.name}.partial")
    with unfinished.open("wb") as stream:
        write(stream)
    unfinished.replace(file)


def replace_text(file: Path, text: str) -> None:
    """Write a text file in the same way."""
    write_whole(file, lambda stream: stream.write(text.encode()))


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


def clear_output_dir(output_dir: Path, start: int, logging_dir: str) -> list[str]:
    """Make way for a run that begins at update `start`.

    From 0 on, what an earlier run has left is removed. Else checkpoints beyond `start`, which are damaged or another
    future of this run, are set aside as `checkpoint-<step>.abandoned`, so that `latest` is always this run's.

    Returns:
        A line about each checkpoint that was set aside.
    """
    notes = []
    if start:
        for step in [s for s in checkpoint_steps(output_dir) if s > start]:
            aside = output_dir / f"checkpoint-{step}.abandoned"
            shutil.rmtree(aside, ignore_errors=True)
            (output_dir / f"checkpoint-{step}").rename(aside)
            notes.append(f"Set aside: {aside}, which is damaged or another future of this run. Remove it at will.\n")
        return notes
    for step in checkpoint_steps(output_dir):
        remove_checkpoint(output_dir / f"checkpoint-{step}")
    logs = output_dir / logging_dir
    mine = [output_dir / name for name in RUN_FILES] + [logs / name for name in LOG_FILES]
    for file in [*mine, *logs.glob("test_samples*.png")]:
        file.unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        shutil.rmtree(output_dir / name, ignore_errors=True)
    return notes


def replace_pipeline(pipeline: DDPMPipelineCustom, output_dir: Path) -> None:
    """Write a pipeline into the output folder, each file at once: a kill leaves old files or new ones.

    Raises:
        OSError: where it can't be written.
    """
    partial = output_dir / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
    except SafetensorError as error:
        raise OSError(f"the pipeline can't be written into {str(output_dir)!r}: {error}") from error
    for file in [p for p in partial.rglob("*") if p.is_file()]:
        place = output_dir / file.relative_to(partial)
        place.parent.mkdir(exist_ok=True)
        file.replace(place)
    shutil.rmtree(partial)
