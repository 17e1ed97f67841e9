"""Training runs, as processes of their own and in this one: the digits, made tiny."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ddpm_hf.config.parsing import PRESETS

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TWO_PROCESSES_ENV = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
DIGITS = PRESETS / "digits.yaml"
TINY_UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "dropout": 0.1,
}
TINY = [
    "--unet", json.dumps(TINY_UNET), "--max_train_steps", "12", "--checkpointing_steps", "4", "--train_batch_size", "4",
    "--gradient_accumulation_steps", "2", "--lr_warmup_steps", "2", "--ddpm_num_inference_steps", "3",
    "--checkpoints_total_limit", "2", "--random_flip", "--eval_batch_size", "4", "--save_images_steps", "6",
    "--report_to", "none",
]  # fmt: skip
TINY_OPTIONS = {
    "dataset_name": "digits", "resolution": 16, "channels": 1, "center_crop": True, "unet": TINY_UNET, "use_ema": True,
    "train_batch_size": 4, "gradient_accumulation_steps": 2, "lr_warmup_steps": 2, "ddpm_num_inference_steps": 3,
    "checkpoints_total_limit": 2, "random_flip": True, "eval_batch_size": 4, "save_images_steps": 15,
    "report_to": ["none"],
}  # fmt: skip


def train_command(output_dir, *options, launcher=()):
    python = launcher or (sys.executable,)
    return [*python, str(ROOT / "training" / "train.py"), *TINY, "--output_dir", str(output_dir), *options]


def start(command, **options):
    """A process, whose output `wait_for` reads."""
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def wait_for(process, text):
    """Read what a process prints, up to `text`, and return it."""
    seen = b""
    while text not in seen:
        chunk = os.read(process.stdout.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk
    return seen


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, cwd=options.pop("cwd", ROOT), **options, check=False)


def run_here(main, arguments):
    """A command in this process, which has paid for its imports: what `run` returns for a process of its own.

    What Accelerate and torch remember of a run is forgotten before and after it.
    """
    import torch
    from accelerate.state import AcceleratorState

    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    threads = torch.get_num_threads()
    AcceleratorState._reset_state(reset_partial_state=True)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)
    if isinstance(status, str):  # as Python ends a process
        stderr.write(status + "\n")
        status = 1
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def train_here(output_dir, *options):
    """`train_command` in this process."""
    from ddpm_hf.training.__main__ import main

    return run_here(main, [*TINY, "--output_dir", str(output_dir), *options])
