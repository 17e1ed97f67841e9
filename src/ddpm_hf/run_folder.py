"""The output folder of a training run: whether it may be used, and the log in it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .checkpoint import check_whole, checkpoint_steps, latest_checkpoint, remove_checkpoint
from .pipeline import CODE_FILES

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from tqdm import tqdm

    from .config import TrainConfig


# What a run leaves in its folder, beside checkpoints and the logs: all that --overwrite_output_dir may remove.
RUN_FILES = ("model_index.json", *CODE_FILES, "samples.png", "real.png", "samples_and_real.png", "loss.png")
RUN_FOLDERS = ("unet", "scheduler")


def prepare_output_dir(output_dir: Path, config: TrainConfig) -> tuple[Path | None, list[str]]:
    """Check, before any work, that the run can write to its folder.

    Returns:
        The checkpoint to resume from, if any, and why newer ones were skipped.

    Raises:
        ValueError: for a folder that can't be written or holds another run, and for a checkpoint that is not there.
    """
    check_writable(output_dir)
    if config.resume_from_checkpoint is None:
        traces = (output_dir / "model_index.json", output_dir / config.logging_dir / "train.jsonl")
        if (checkpoint_steps(output_dir) or any(t.exists() for t in traces)) and not config.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds another run: go on with --resume_from_checkpoint latest, "
                "replace it with --overwrite_output_dir, or choose another --output_dir."
            )
        return None, []
    if config.resume_from_checkpoint != "latest":
        folder = Path(config.resume_from_checkpoint)
        if not folder.is_dir() and folder.name == config.resume_from_checkpoint:  # a bare name
            folder = output_dir / folder
        check_whole(folder)
        return folder, []
    checkpoint, skipped = latest_checkpoint(output_dir)
    if checkpoint is None:
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but {str(output_dir)!r} has no whole checkpoint. "
            + " ".join(skipped)
        )
    return checkpoint, skipped


def check_writable(folder: Path) -> None:
    """Raise a ValueError unless the folder is there, or can be made, and takes files. Leaves nothing behind."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` {str(folder)!r} can't be written to ({error}): choose another one.") from error


def clear_output_dir(output_dir: Path, start: int, logging_dir: str) -> None:
    """Make way for a run that begins at update `start`.

    From 0 on, what an earlier run has left is removed. Else checkpoints beyond `start`, which are damaged or another
    future of this run, are set aside as `checkpoint-<step>.abandoned`, so that `latest` is always this run's.
    """
    if start:
        for step in [s for s in checkpoint_steps(output_dir) if s > start]:
            aside = output_dir / f"checkpoint-{step}.abandoned"
            shutil.rmtree(aside, ignore_errors=True)
            (output_dir / f"checkpoint-{step}").rename(aside)
        return
    for step in checkpoint_steps(output_dir):
        remove_checkpoint(output_dir / f"checkpoint-{step}")
    logs = output_dir / logging_dir
    for file in [*(output_dir / name for name in RUN_FILES), logs / "train.jsonl", *logs.glob("samples-*.png")]:
        file.unlink(missing_ok=True)
    for name in RUN_FOLDERS:
        shutil.rmtree(output_dir / name, ignore_errors=True)


class TrainingLog:
    """Losses and rates of a run: in the progress bar, in `logs/train.jsonl`, and in the tracker."""

    def __init__(self, accelerator: Accelerator, folder: Path, config: TrainConfig, start: int) -> None:
        self.accelerator = accelerator
        self.file = folder / "train.jsonl"
        self.losses: list[Tensor] = []
        self.entries: list[dict[str, Any]] = []
        if not accelerator.is_main_process:
            return
        self.entries = [e for e in self._read() if e["step"] <= start]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", "utf-8")
        rewritten = self.file.with_suffix(".partial")
        rewritten.write_text("".join(json.dumps(e) + "\n" for e in self.entries), "utf-8")
        rewritten.replace(self.file)
        flat = {k: v for k, v in asdict(config).items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("train_ddpm", flat)

    def _read(self) -> Iterator[dict[str, Any]]:
        """The entries of the part of the run before this one, up to a line that a crash cut off."""
        if not self.file.is_file():
            return
        for line in self.file.read_text("utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def add_loss(self, loss: Tensor) -> None:
        """Keep the loss of a micro-step, without waiting for the device."""
        self.losses.append(loss.detach())

    def write(self, bar: tqdm, **values: Any) -> None:
        """Log the mean loss since the last call, over all processes, and `values`."""
        mean = self.accelerator.reduce(sum(self.losses) / len(self.losses), reduction="mean")
        self.losses.clear()
        if not self.accelerator.is_main_process:
            return
        entry = {"loss": float(mean), **values}
        if not math.isfinite(entry["loss"] + entry.get("grad_norm", 0)):
            raise FloatingPointError(
                f"the loss is {entry['loss']} and the norm of the gradient {entry.get('grad_norm')} at step "
                f"{entry['step']}: lower --learning_rate, or use --mixed_precision bf16 instead of fp16. The last "
                "checkpoint is unharmed."
            )
        bar.set_postfix(loss=f"{entry['loss']:.4f}")
        self.entries.append(entry)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        self.accelerator.log(entry, step=entry["step"])

    def pictures(self, grid: Image.Image, step: int) -> None:
        """A grid of samples: `logs/samples-<step>.png`, and `test_samples` in the tracker."""
        if not self.accelerator.is_main_process:
            return
        grid.save(self.file.parent / f"samples-{step}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("test_samples", np.asarray(grid), step, dataformats="HWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"test_samples": [np.asarray(grid)]}, step=step)

    def curve(self) -> tuple[list[int], list[float]]:
        """Steps and losses of the whole run, resumed parts included."""
        return [e["step"] for e in self.entries], [e["loss"] for e in self.entries]
