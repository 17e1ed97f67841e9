"""Training started as users start it, by `accelerate launch` and torchrun, on this machine or on two that it plays.

`start_ranks` starts what a launcher would have started, without the seconds that every process takes to import torch.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from support.runs import ROOT, SUPPORT, TINY

TRAIN = ROOT / "training" / "train.py"
CONFIGS = ROOT / "training" / "accelerate"
FSDP_ON_CPU = SUPPORT / "fsdp_on_cpu.py"
SMALL = [
    *TINY, "--resolution", "16", "--channels", "1", "--center_crop", "--use_ema", "--ddpm_num_steps", "20",
    "--calibration_images", "0", "--mixed_precision", "no",
]  # fmt: skip
# All that a run does, in six updates. With an epsilon as large as this, Adam's steps are continuous in the gradient.
EVERYTHING = [
    *SMALL, "--max_train_steps", "6", "--checkpointing_steps", "3", "--save_images_steps", "4", "--eval_steps", "3",
    "--eval_images", "17", "--calibration_images", "16", "--learning_rate", "0.1", "--adam_epsilon", "0.1",
]  # fmt: skip

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["ddpm_hf.training.loop", "support.launching"])


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def node_env(folder):
    """The environment of a machine of its own: caches and temporary files in `folder`, no GPU, one thread."""
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    own = {"HF_HOME": folder / "hf", "HF_DATASETS_CACHE": folder / "hf" / "datasets", "TMPDIR": folder / "tmp"}
    return {**os.environ, **{k: str(v) for k, v in own.items()}, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


class Started:
    """A process, and what it has printed."""

    def __init__(self, process, log):
        self.process, self.log = process, log

    @property
    def output(self):
        return self.log.read_text("utf-8", "replace") if self.log.exists() else ""

    def is_running(self):
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process.is_alive()

    def wait(self):
        """The exit status, with the output."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.wait(), self.output
        self.process.join()
        return self.process.exitcode, self.output


def start(command, env, log):
    """A launcher, as somebody types it."""
    with log.open("wb") as stream:
        return Started(subprocess.Popen(command, cwd=ROOT, env=env, stdout=stream, stderr=subprocess.STDOUT), log)


def accelerate_launch(config, *arguments):
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config), *arguments]


def start_two_nodes(folder, *options, output_dirs):
    """Two launchers of a process each, as training/accelerate/two_nodes.yaml says."""
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port(), "--num_processes", "2"]
    launcher = accelerate_launch("two_nodes.yaml", *where)
    return [
        start(
            [*launcher, "--machine_rank", str(rank), str(TRAIN), *options, "--output_dir", str(output_dir)],
            node_env(folder / f"node{rank}"),
            folder / f"node{rank}.log",
        )
        for rank, output_dir in enumerate(output_dirs)
    ]


def start_ranks(folder, *options, by_rank=((), ()), config=None):
    """Two processes as the launchers of two nodes start them; with `config`, for this file of training/accelerate."""
    env = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = free_port()
    if config is not None:
        arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / config), str(TRAIN)])
        env |= {k: v for k, v in prepare_multi_gpu_env(_validate_launch_command(arguments)[0]).items() if "FSDP" in k}
    return [
        start_script(
            TRAIN,
            *options,
            *own,
            env={**node_env(folder / f"node{rank}"), **env, "RANK": str(rank)},
            log=folder / f"rank{rank}.log",
        )
        for rank, own in enumerate(by_rank)
    ]


def start_script(script, *options, env, log):
    """A script of this project, in a process that need not import torch."""
    process = forkserver.Process(target=_script, args=(script, options, env, log))
    process.start()
    return Started(process, log)


def _script(script, options, env, log):
    from support.fsdp_on_cpu import allow_fsdp_on_cpu

    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    tempfile.tempdir = None  # look again
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if "ACCELERATE_USE_FSDP" in env:
        allow_fsdp_on_cpu()
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


def succeed(started):
    """What the processes print, all of which must end well."""
    ends = [process.wait() for process in started]
    assert not any(status for status, _ in ends), "\n".join(output[-10_000:] for _, output in ends)
    return [output for _, output in ends]


def wait_until(condition, started):
    """Wait for something that the processes do. None of them may end before."""
    while not condition():
        for process in started:
            assert process.is_running(), process.output[-10_000:]
        time.sleep(0.05)
