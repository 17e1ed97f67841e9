"""A training command that takes turns: it runs for some updates, and is stopped while others run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
from common.networks import NETWORKS

OURS = str(Path(__file__).parents[2] / "train.py")
SOURCE = str(Path(__file__).parents[3] / "src")
# Nothing but updates: no checkpoint, export or picture comes before the first epoch ends.
UPDATES_ALONE = [
    "--center_crop", "--use_ema", "--num_epochs", "10000", "--checkpointing_steps", "1000000", "--save_images_epochs",
    "10000", "--save_model_epochs", "10000", "--ddpm_num_inference_steps", "2", "--eval_batch_size", "1",
    "--logger", "tensorboard",
]  # fmt: skip


class TrainingProcess:
    """`train_unconditional.py`, or ours, as a process. The kernel stops it, except during `advance`.

    On a GPU, kernels that it queued before it was stopped still run, in the time of whoever comes next.
    """

    def __init__(self, command: list[str], log: Path, progress: str = r"Training:[^\r]*? (\d+)/\d+ \[") -> None:
        self.command, self.log, self.progress = command, log, re.compile(progress)
        self.done = 0
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        """Start it, and wait for the third update: what comes before is not training."""
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, "TQDM_MININTERVAL": "0", "PYTHONPATH": SOURCE},
            stdout=self.log.open("w"),
            stderr=subprocess.PIPE,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self._wait_for(3)
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def advance(self, updates: int) -> None:
        """Run for this many updates."""
        goal = self.done + updates
        self._signal(signal.SIGCONT)
        self._wait_for(goal)
        self._signal(signal.SIGSTOP)

    def peak_mib(self) -> float:
        """The largest memory that one of its processes has had: resident, of the host, never of a GPU."""
        statuses = [Path(f"/proc/{process.pid}/status").read_text() for process in self._family()]
        return max(int(status.split("VmHWM:")[1].split()[0]) for status in statuses) / 2**10

    def _family(self) -> list[psutil.Process]:
        """The process and all that it has started: torchrun puts its workers into sessions of their own."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def _signal(self, signum: int) -> None:
        if self.process.poll() is None:
            for process in self._family():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signum)

    def _wait_for(self, updates: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.done >= updates or self.process.poll() is not None)
        if self.done < updates:
            raise SystemExit(f"{' '.join(self.command)}\nended with status {self.process.returncode}: see {self.log}")

    def _read(self) -> None:
        """Follow the progress bar, and copy the output into a file."""
        assert self.process.stderr is not None
        last = ""
        with self.log.with_suffix(".err").open("w") as kept:
            while chunk := os.read(self.process.stderr.fileno(), 65536).decode(errors="replace"):
                kept.write(chunk)
                kept.flush()
                last = (last + chunk)[-4096:]
                found = self.progress.findall(last)
                with self._changed:
                    self.done = max([self.done, *map(int, found)])
                    self._changed.notify()
        self.process.wait()
        with self._changed:
            self._changed.notify()


def write_network(name: str, folder: Path, **changes: Any) -> Path:
    """The configuration of one of the networks, for RGB, as `--model_config_name_or_path` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {**NETWORKS[name], "in_channels": 3, "out_channels": 3, **changes}
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **arguments}))
    return folder
