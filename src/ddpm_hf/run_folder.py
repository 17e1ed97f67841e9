"""The output folder of a training run: whether it may be used, and the log in it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .checkpoint import check_whole, checkpoint_steps, latest_checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image
    from tqdm import tqdm

    from .config import TrainConfig


def prepare_output_dir(output_dir: Path, config: TrainConfig) -> Path | None:
    """Check, before any work, that the run can write to its folder; returns the checkpoint to resume from, if any.

    Raises:
        ValueError: for a folder that can't be written or holds another run, and for a checkpoint that is not there.
    """
    check_writable(output_dir)
    if config.resume_from_checkpoint is None:
        used = checkpoint_steps(output_dir) or (output_dir / "model_index.json").exists()
        if used and not config.overwrite_output_dir:
            raise ValueError(
                f"`output_dir` {str(output_dir)!r} holds another run: go on with --resume_from_checkpoint latest, "
                "replace it with --overwrite_output_dir, or choose another --output_dir."
            )
        return None
    if config.resume_from_checkpoint != "latest":
        folder = Path(config.resume_from_checkpoint)
        folder = folder if folder.is_dir() else output_dir / folder.name
        check_whole(folder)
        return folder
    checkpoint, skipped = latest_checkpoint(output_dir)
    if checkpoint is None:
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but {str(output_dir)!r} has no whole checkpoint. "
            + " ".join(skipped)
        )
    return checkpoint


def check_writable(folder: Path) -> None:
    """Raise a ValueError unless the folder is there, or can be made, and takes files. Leaves nothing behind."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` {str(folder)!r} can't be written to ({error}): choose another one.") from error


class TrainingLog:
    """Losses and rates of a run: in the progress bar, in `logs/train.jsonl`, and in the tracker."""

    def __init__(self, accelerator: Accelerator, folder: Path, config: TrainConfig, start: int) -> None:
        self.accelerator = accelerator
        self.file = folder / "train.jsonl"
        self.losses: list[Tensor] = []
        self.entries: list[dict[str, Any]] = []
        if not accelerator.is_main_process:
            return
        output_dir = folder.parent
        if start == 0:  # what an overwritten run has left would mix with ours
            for step in checkpoint_steps(output_dir):
                shutil.rmtree(output_dir / f"checkpoint-{step}")
        elif self.file.is_file():
            entries = [json.loads(line) for line in self.file.read_text("utf-8").splitlines()]
            self.entries = [e for e in entries if e["step"] <= start]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", "utf-8")
        self.file.write_text("".join(json.dumps(e) + "\n" for e in self.entries), "utf-8")
        flat = {k: v for k, v in asdict(config).items() if isinstance(v, (int, float, str, bool))}
        accelerator.init_trackers("train_ddpm", flat)

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
        if not math.isfinite(entry["loss"]):
            raise FloatingPointError(
                f"the loss is {entry['loss']} at step {entry['step']}: lower --learning_rate, or use "
                "--mixed_precision bf16 instead of fp16. The last checkpoint is unharmed."
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
