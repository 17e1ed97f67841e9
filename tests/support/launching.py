"""Training started as users start it: by `accelerate launch` and torchrun, on this machine or on two that it plays."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from support.runs import ROOT, SUPPORT, TINY

TRAIN = ROOT / "training" / "train.py"
CONFIGS = ROOT / "training" / "accelerate"
FSDP_ON_CPU = SUPPORT / "fsdp_on_cpu.py"
# Short chains, and a large epsilon: Adam's steps are then as continuous in the gradient as those of plain descent.
EVERYTHING = [
    *TINY, "--resolution", "16", "--channels", "1", "--center_crop", "--use_ema", "--max_train_steps", "6",
    "--checkpointing_steps", "3", "--save_images_steps", "4", "--eval_steps", "3", "--eval_images", "9",
    "--ddpm_num_steps", "20", "--calibration_images", "16", "--learning_rate", "0.1", "--adam_epsilon", "0.1",
    "--mixed_precision", "no",
]  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def node_env(folder):
    """The environment of a machine of its own: caches and temporary files in `folder`, no GPU, one thread."""
    (Path(folder) / "tmp").mkdir(parents=True, exist_ok=True)
    own = {"HF_HOME": folder / "hf", "HF_DATASETS_CACHE": folder / "hf" / "datasets", "TMPDIR": folder / "tmp"}
    return {**os.environ, **{k: str(v) for k, v in own.items()}, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def accelerate_launch(config, *arguments):
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *arguments]


def start(command, env, log):
    """A process that writes all it says into a file; its children die with it or end by themselves."""
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT)
