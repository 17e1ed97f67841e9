"""Images per second in training, beside diffusers' own `train_unconditional.py`: same images, network, batch, Python.

    python training/benchmarks/training_speed.py --stock_script train_unconditional.py --stock_python PYTHON

(The script lies in diffusers' repository under examples/unconditional_image_generation. It needs torchvision: name a
Python that has it, and what this package needs, by `--stock_python`, where this one has not.)

First the data alone (`data_speed.py`). Then each peer is the real command, reading real image files. They take turns of
some updates each, in which the others stand still, so that what else the machine does falls on all of them alike; time
counts from the fourth update on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from common.networks import NETWORKS
from common.scoring import labelled_digits
from common.timing import best_device, flops, markdown_table, matmul_peak, time_in_turns, write_results
from common.training_process import OURS, UPDATES_ALONE, TrainingProcess, write_network
from diffusers import UNet2DModel
from training_quality import write_images

# Images per update, and updates per turn: a second or two on two CPU cores, some on a GPU.
TURNS = {
    "cpu": {"tiny": (16, 20), "small": (16, 5), "paper": (4, 2)},
    "cuda": {"tiny": (512, 100), "small": (256, 100), "paper": (128, 100)},
}
AUTO = ["--mixed_precision", "auto", "--channels_last", "auto"]
STOCK_PROGRESS = r"step=(\d+)"


def peers(name: str, batch: int, options: argparse.Namespace, images: Path, work: Path) -> dict[str, TrainingProcess]:
    """The commands to compare on one of the networks."""
    network = write_network(name, work / f"network-{name}")
    common = [
        "--train_data_dir", str(images), "--resolution", str(NETWORKS[name]["sample_size"]), "--train_batch_size",
        str(batch), "--model_config_name_or_path", str(network), *UPDATES_ALONE,
    ]  # fmt: skip
    stock, ours = [options.stock_python, options.stock_script], [options.stock_python, OURS]
    cached = ["--cache_dir", str(work / "cache"), "--overwrite_output_dir"]
    commands = {
        "stock": [*stock, *common],
        "stock, bf16": [*stock, *common, "--mixed_precision", "bf16"],
        "ours": [*ours, *common, *cached],
        "ours, auto": [*ours, *common, *cached, *AUTO],
    }
    if torch.cuda.is_available():
        commands["ours, auto, compiled"] = [*commands["ours, auto"], "--compile", "yes"]
    processes = {}
    for peer in options.peers or commands:
        folder = work / f"{name}-{peer.replace(', ', '-')}"
        command = [*commands[peer], "--output_dir", str(folder)]
        folder.parent.mkdir(parents=True, exist_ok=True)
        processes[peer] = TrainingProcess(
            command, Path(f"{folder}.log"), **({"progress": STOCK_PROGRESS} if "stock" in peer else {})
        )
    return processes


def speed(name: str, options: argparse.Namespace, images: Path, work: Path) -> list[dict[str, object]]:
    """Time the peers on one of the networks, a row for each."""
    batch, updates = TURNS[best_device().type][name]
    with ExitStack() as running:
        running_peers = {
            peer: running.enter_context(process) for peer, process in peers(name, batch, options, images, work).items()
        }
        seconds = time_in_turns({k: partial(p.advance, updates) for k, p in running_peers.items()}, options.rounds)
        memory = {peer: process.peak_mib() for peer, process in running_peers.items()}
    size = NETWORKS[name]["sample_size"]
    device = best_device()
    network = UNet2DModel(**{**NETWORKS[name], "in_channels": 3, "out_channels": 3}).to(device)
    x, t = torch.randn(1, 3, size, size, device=device), torch.zeros(1, dtype=torch.long, device=device)
    per_image = 3 * flops(lambda: network(x, t))  # forward, and twice as much backward
    rows: list[dict[str, object]] = []
    for peer, duration in seconds.items():
        rate = batch * updates / duration
        rows.append(
            {
                "network": name, "peer": peer, "batch": batch, "images/s": rate,
                "× stock": seconds["stock"] / duration if "stock" in seconds else None,
                "GFLOP/s": rate * per_image / 1e9, "peak host MiB": memory[peer],
            }
        )  # fmt: skip
    return rows


def data_rates(options: argparse.Namespace, images: Path, work: Path) -> dict[str, float]:
    """Images per second that the data alone could feed."""
    script = str(Path(__file__).parent / "data_speed.py")
    command = [options.stock_python, script, str(images), "--cache_dir", str(work / "cache")]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def write_files(number: int, folder: Path) -> Path:
    """Scans of digits as RGB files, over and over."""
    pixels, _ = labelled_digits(32)
    write_images(pixels.repeat(-(-number // len(pixels)), 1, 1, 1)[:number], folder)
    return folder


def main() -> None:
    """Time, print tables, write `training_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stock_script", required=True)
    parser.add_argument("--stock_python", default=sys.executable, help="a Python that has torchvision")
    parser.add_argument(
        "--train_data_dir", type=Path, help="a folder of at least 3,000 images; default: scans of digits"
    )
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--peers", nargs="+", help="e.g. stock ours 'ours, auto'; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("bench-training-speed"))
    options = parser.parse_args()

    work = options.output_dir.absolute()
    images = options.train_data_dir or write_files(4096, work / "images")
    data = data_rates(options, images, work)
    print(f"data alone: {data['ours']:,.0f} images/s, {data['ours'] / data['stock']:.0f} × stock")
    rows = [row for name in options.networks for row in speed(name, options, images.absolute(), work)]
    peak = {str(dtype).removeprefix("torch."): matmul_peak(dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    print(f"{markdown_table(rows)}\nlargest matrix products: {peak} GFLOP/s")
    versions = "import torch, diffusers; print(f'torch {torch.__version__}, diffusers {diffusers.__version__}')"
    peers_run_in = subprocess.run([options.stock_python, "-c", versions], capture_output=True, text=True, check=True)
    results = {"data_images_per_second": data, "training": rows, "matmul_gflops": peak}
    write_results(work / "training_speed.json", {"peers_run_in": peers_run_in.stdout.strip(), **results})


if __name__ == "__main__":
    main()
