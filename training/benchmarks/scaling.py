"""How time and memory of training grow with the batch, the resolution, T and the number of processes.

    python training/benchmarks/scaling.py

One network, one thing changed at a time. The runs are real commands that take turns, as in `training_speed.py`. Two
processes share the cores of a CPU; on a machine with GPUs each has its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.networks import NETWORKS
from common.timing import markdown_table, time_in_turns, write_results
from common.training_process import OURS, UPDATES_ALONE, TrainingProcess, write_network
from training_speed import write_files

BASE = {"batch": 16, "resolution": 32, "T": 1000, "processes": 1}
CHANGES: list[dict[str, int]] = [
    {},
    {"batch": 4},
    {"batch": 64},
    {"resolution": 16},
    {"resolution": 64},
    {"T": 100},
    {"T": 4000},
    {"processes": 2},
]


def training(setting: dict[str, int], options: argparse.Namespace, images: Path, work: Path) -> TrainingProcess:
    """Our command in one setting; `batch` counts the images of an update, over all processes."""
    processes, resolution = setting["processes"], setting["resolution"]
    name = "-".join(f"{key}{value}" for key, value in setting.items())
    network = write_network(options.network, work / f"network-{resolution}", sample_size=resolution)
    threads = max(1, torch.get_num_threads() // processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return TrainingProcess(
        [
            "env", f"OMP_NUM_THREADS={threads}", sys.executable, *(launcher if processes > 1 else []), OURS,
            "--train_data_dir", str(images), "--cache_dir", str(work / "cache"), "--resolution", str(resolution),
            "--train_batch_size", str(setting["batch"] // processes), "--ddpm_num_steps", str(setting["T"]),
            "--model_config_name_or_path", str(network), *UPDATES_ALONE, "--output_dir", str(work / name),
            "--overwrite_output_dir", *options.flags,
        ],
        work / f"{name}.log",
    )  # fmt: skip


def main() -> None:
    """Time, print a table, write `scaling.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NETWORKS), default="small")
    parser.add_argument("--updates", type=int, default=4, help="in a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="more flags of train.py")
    parser.add_argument("--output_dir", type=Path, default=Path("bench-scaling"))
    options = parser.parse_args()

    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # which torchrun needs to be told
    work = options.output_dir.absolute()
    images = write_files(4096, work / "images")
    settings: list[dict[str, Any]] = [{**BASE, **change} for change in CHANGES]
    with ExitStack() as running:
        runs = [running.enter_context(training(setting, options, images, work)) for setting in settings]
        turns = {str(i): partial(run.advance, options.updates) for i, run in enumerate(runs)}
        seconds = time_in_turns(turns, options.rounds)
        rows = [
            {
                **setting,
                "ms per update": 1000 * seconds[str(i)] / options.updates,
                "images/s": setting["batch"] * options.updates / seconds[str(i)],
                "peak host MiB of a process": run.peak_mib(),
            }
            for i, (setting, run) in enumerate(zip(settings, runs, strict=True))
        ]
    print(markdown_table(rows))
    write_results(work / "scaling.json", {"network": options.network, "training": rows})


if __name__ == "__main__":
    main()
