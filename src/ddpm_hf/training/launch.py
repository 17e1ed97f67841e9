"""`ddpm-hf train` by several processes, which Accelerate's own launcher starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..config.launch import LaunchOptions


def is_launched() -> bool:
    """Whether a launcher (Accelerate's, torchrun) has started this process."""
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def needs_launcher(options: LaunchOptions) -> bool:
    """Whether `accelerate launch` would do anything else than start one process with Accelerate's defaults."""
    several = (options.num_processes or torch.accelerator.device_count()) > 1
    return several or replace(options, num_processes=None).given() != [] or _config_file(options) is not None


def launch(options: LaunchOptions, argv: Sequence[str], module: str) -> None:
    """Run `python -m MODULE ARGV` in every process.

    Raises:
        SystemExit: where a process fails, with its exit status; 128 + n if signal n ended it.
        OSError: for a port that is in use.
        ValueError: for what Accelerate refuses.
    """
    flags = launcher_flags(options)
    arguments = launch_command_parser().parse_args([*flags, "--module", module, *argv])
    # A launcher of one process only waits for it. The terminal sends Ctrl-C to both; SIGTERM has to be passed on.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, _pass_on)
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        _exit(error.returncode)
    except ChildFailedError as error:
        _exit(error.get_first_failure()[1].exitcode)
    except SignalException as interrupted:
        sys.exit(128 + interrupted.sigval)


def launcher_flags(options: LaunchOptions) -> list[str]:
    """The flags of `accelerate launch` for these options.

    Accelerate starts several CPU processes as it does GPU processes (--multi_gpu), if told to use the CPU by the
    environment, which this function sees to; with --cpu it would start a single one.
    """
    file = _config_file(options)
    config = load_config_from_file(file) if file is not None else None
    flags = {name: value for name, value in vars(options).items() if value is not None and name != "accelerate_config"}
    if config is None:
        defaults = {"num_processes": max(torch.accelerator.device_count(), 1), "num_machines": 1}
        flags = {**defaults, "mixed_precision": "no", "dynamo_backend": "no", **flags}
    else:
        flags["config_file"] = file
    if flags.get("num_machines", getattr(config, "num_machines", 1)) == 1:
        flags.setdefault("main_process_port", getattr(config, "main_process_port", None) or 0)  # 0: any that is free
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    if getattr(config, "use_cpu", False) or not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    several = flags.get("num_processes", getattr(config, "num_processes", 1)) > 1
    if several and (config is None or config.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)):
        words.append("--multi_gpu")
    return words


def _config_file(options: LaunchOptions) -> str | None:
    """The file of `accelerate config` that applies."""
    return options.accelerate_config or (default_config_file if Path(default_config_file).is_file() else None)


def _pass_on(signum: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(signum)


def _exit(code: int) -> None:
    """End as a process ended; its own message says why, unless a signal killed it."""
    if code < 0:
        print(f"A process of the run was ended by {signal.Signals(-code).name}.", file=sys.stderr)
    sys.exit(code if code >= 0 else 128 - code)
