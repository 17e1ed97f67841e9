"""The log of a run: in the progress bar, in `logs/train.jsonl`, and in the trackers."""

from __future__ import annotations

import importlib.util
import json
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from ..config.training import TrainConfig
from ..progress import Bar, progress
from ..storage.files import write_text_atomically

LOG_EVERY = 10  # updates
QUARTERS = 4  # of the timesteps, whose losses are logged separately


def check_trackers(config: TrainConfig) -> list[str]:
    """The trackers to report to.

    Raises:
        ValueError: where the package of a requested one is not installed; Accelerate would silently do without it.
    """
    wanted = [config.logger] if config.logger else config.report_to
    if wanted is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    missing = [name for name in wanted if name != "none" and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"`report_to` has {missing[0]!r}, but it is not installed: pip install {missing[0]}.")
    return [name for name in wanted if name != "none"]


class TrainingLog:
    """Losses and rates of a run of `max_steps` updates.

    `train.jsonl` holds what follows from the options alone, so that a run that was killed and resumed leaves the same
    file as one that was not. Speed goes to the progress bar and to the trackers.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, max_steps: int) -> None:
        self.accelerator = accelerator
        self.config = config
        self.max_steps = max_steps
        self.file = Path(config.output_dir) / config.logging_dir / "train.jsonl"
        self.entries: list[dict[str, Any]] = []
        self._bar: Bar[int] = progress(range(0), desc="Training", unit="step", is_shown=False)
        self._rows: list[Tensor] = []  # of this process, since the last entry
        self._carried: list[list[float]] = []  # of all processes, from the checkpoint
        self._bad_in_a_row = torch.zeros((), device=accelerator.device)
        self._worst_streak = self._bad_in_a_row.clone()
        self._images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def begin(self, start: int, unlogged: list[list[float]], skipped_images: Sequence[Any] = ()) -> None:
        """Open the log at update `start`; entries beyond it are dropped.

        Args:
            start: updates done.
            unlogged: the losses since the last entry, as `unlogged` gave them for the checkpoint.
            skipped_images: dataclasses, for `skipped_images.json`.
        """
        self._carried = unlogged
        if not self.accelerator.is_main_process:
            return
        self.entries = [e for e in self._read() if e["step"] <= start]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        (self.file.parent / "config.json").write_text(json.dumps(self.config.public(), indent=2) + "\n", "utf-8")
        if skipped_images:
            report = json.dumps([asdict(image) for image in skipped_images], indent=2)
            (self.file.parent / "skipped_images.json").write_text(report + "\n", "utf-8")
        write_text_atomically(self.file, "".join(json.dumps(e) + "\n" for e in self.entries))
        name = self.file.parent / "tracker_run"
        if not (start and name.is_file()):
            name.write_text(uuid.uuid4().hex, "utf-8")
        flat = {k: v for k, v in self.config.public().items() if isinstance(v, (int, float, str, bool))}
        self._since = time.perf_counter()
        self.accelerator.init_trackers(
            "train_ddpm",
            flat,
            {
                "tensorboard": {"purge_step": start + 1},
                "wandb": {"id": name.read_text("utf-8"), "resume": "allow"},
                "trackio": {"name": name.read_text("utf-8"), "resume": "allow"},
            },
        )

    def _read(self) -> Iterator[dict[str, Any]]:
        """The entries of the earlier parts of the run, up to a line that a crash cut off."""
        if not self.file.is_file():
            return
        for line in self.file.read_text("utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not (
                isinstance(entry, dict) and "step" in entry and all(type(v) in (int, float) for v in entry.values())
            ):
                return  # not ours
            yield entry

    def bar(self, start: int) -> Bar[int]:
        """The updates that are left, as a progress bar. With a time budget, `max_steps` may still change."""
        self._bar = progress(
            self._steps(start), desc="Training", unit="step", total=self.max_steps, initial=start,
            is_shown=self.accelerator.is_main_process,
        )  # fmt: skip
        return self._bar

    def _steps(self, start: int) -> Iterator[int]:
        while start < self.max_steps:
            yield start
            start += 1
            self._bar.total = self.max_steps

    def close(self) -> None:
        """End the progress bar: what is printed from now on comes below it."""
        self._bar.close()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count as training, for the speed."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def add_losses(self, losses: Tensor, t: Tensor, waited: float) -> None:
        """Keep the losses of a micro-step and their t, both (B,), without waiting for the device.

        Args:
            waited: seconds for which the batch was not ready.
        """
        losses = losses.detach()
        is_finite = losses.isfinite()
        value_and_count = torch.stack([losses.where(is_finite, 0.0), is_finite.float()])
        quarter = (t * QUARTERS // self.config.ddpm_num_steps).expand(2, -1)
        sums = torch.zeros(2, QUARTERS, device=losses.device).scatter_add_(1, quarter, value_and_count)
        self._rows.append(torch.cat([sums.flatten(), torch.zeros(1, device=losses.device)]))
        self._images += len(losses) * self.accelerator.num_processes
        self._waited += waited

    def add_gradient(self, is_finite: Tensor) -> None:
        """Count an update that is skipped because its gradient is not finite, without waiting for the device."""
        bad = 1 - is_finite.float()
        self._bad_in_a_row = (self._bad_in_a_row + bad) * bad
        self._worst_streak = torch.maximum(self._worst_streak, self._bad_in_a_row)
        if self.accelerator.is_main_process:
            self._rows[-1][-1] = bad

    def has_diverged(self) -> bool:
        """Whether the latest gradient was not finite; overflows of fp16, which a lower scale mends, do not count."""
        scaler = self.accelerator.scaler
        has_room = scaler is not None and scaler.get_scale() >= 1  # below, the loss overflows without being scaled up
        return bool(self._bad_in_a_row) and not has_room

    def unlogged(self) -> list[list[float]]:
        """The losses since the last entry, of all processes; for a checkpoint. All of them must call it."""
        if not self._rows:
            return self._carried
        return self._carried + self.accelerator.gather(torch.stack(self._rows)).tolist()

    def write(self, step: int, **values: Any) -> None:
        """Every LOG_EVERY updates and after the last: log the mean losses since the last entry, and `values`.

        All processes must call it; the means are over all of them.

        Args:
            step: updates done.
            values: by name; what is None or not finite is left out.

        Raises:
            FloatingPointError: after too many skipped updates in a row.
        """
        if step % LOG_EVERY and step != self.max_steps:
            return
        sums = [math.fsum(column) for column in zip(*self.unlogged(), strict=True)]  # exact, in any order
        self._rows, self._carried = [], []
        seconds = time.perf_counter() - self._since
        speed = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self._images, self._waited, self._since = 0, 0.0, time.perf_counter()
        if self.accelerator.is_main_process:
            known = {k: float(v) for k, v in values.items() if v is not None}
            skipped = {"skipped": int(sums[-1])} if sums[-1] else {}
            self._append({"step": step, **_means(sums), **known, **skipped}, speed)
        self._check_skipped(step)

    def write_validation(self, step: int, values: dict[str, float]) -> None:
        """Log what was measured after update `step`, in an entry of its own."""
        if self.accelerator.is_main_process:
            self._append({"step": step, **values}, {})

    def _append(self, entry: dict[str, Any], speed: dict[str, float]) -> None:
        entry = {k: v for k, v in entry.items() if math.isfinite(v)}
        self.entries.append(entry)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        if speed:
            loss = f"{entry['loss']:.4f}" if "loss" in entry else "not finite"
            rate, wait = f"{speed['images_per_second']:.0f}", f"{speed['data_wait']:.0%}"
            self._bar.set_postfix(loss=loss, images_per_s=rate, data_wait=wait, refresh=False)
        self.accelerator.log({**entry, **speed}, step=entry["step"])

    def _check_skipped(self, step: int) -> None:
        in_a_row, limit = int(self._worst_streak), self.config.max_skipped_steps
        if in_a_row >= limit or (step == self.max_steps and self.has_diverged()):
            raise FloatingPointError(
                f"{in_a_row} gradients in a row were not finite (--max_skipped_steps is {limit}), so the run ends at "
                f"update {step}. No checkpoint was written since they began: resume from the last one with a lower "
                "--learning_rate, or with --mixed_precision bf16 instead of fp16."
            )

    def pictures(self, grids: dict[str, Image.Image], step: int) -> None:
        """Write grids of samples as `logs/<name>-<step>.png`, and to the trackers by their names."""
        if not self.accelerator.is_main_process:
            return
        for name, grid in grids.items():
            grid.save(self.file.parent / f"{name}-{step}.png")
        for tracker in self.accelerator.trackers:
            for name, grid in grids.items():
                if tracker.name == "tensorboard":
                    tracker.writer.add_image(name, np.asarray(grid), step, dataformats="HWC")
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({name: [np.asarray(grid)]}, step=step)

    def validations(self) -> list[dict[str, Any]]:
        """The entries of all validations, resumed parts included; in the main process."""
        return [e for e in self.entries if any(name.startswith("eval_") for name in e)]

    def last_step(self) -> int:
        """The last update that was logged, in the main process; a run may have returned to its best checkpoint."""
        return max((entry["step"] for entry in self.entries[-1:]), default=0)

    def loss_curve(self) -> tuple[list[int], list[float]]:
        """Steps and losses of the whole run, resumed parts included."""
        entries = [e for e in self.entries if "loss" in e]
        return [e["step"] for e in entries], [e["loss"] for e in entries]


def _means(sums: Sequence[float]) -> dict[str, float]:
    """The mean loss, and that of each quarter of the timesteps, from sums of losses and counts."""
    losses, counts = sums[:QUARTERS], sums[QUARTERS : 2 * QUARTERS]
    means = {"loss": math.fsum(losses) / sum(counts)} if sum(counts) else {}
    for i, (loss, count) in enumerate(zip(losses, counts, strict=True)):
        if count:
            means[f"loss_quarter_{i + 1}"] = loss / count
    return means
