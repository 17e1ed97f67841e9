"""Sampling at equal steps: diffusers' `DDPMPipeline`, ours, and ours after `enable_fast_sampling`.

    python training/benchmarks/sampling_speed.py --output_dir bench-sampling

Three jobs of 1000 steps on each of three networks of random weights: one image, one batch of 16, and 10,000 images in
batches of 64. Each is set up for the whole job, and a few steps of it are timed, in turns. "The job, fast × stock" is
what they imply for the whole job, set-up included: below 1, it would have been slower than stock. Beside the times:
the error of the fast network's prediction against float32, what share of the machine's fastest matrix product the
network reaches, and the peak memory of one step at the largest batch. Nothing compiled before this run is used.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common.networks import NETWORKS, build
from common.timing import best_device, flops, markdown_table, matmul_peak, peak_memory, time_in_turns, write_results
from diffusers import DDPMPipeline, DDPMScheduler
from torch import Tensor

from ddpm_hf import DDPMPipelineCustom

STEPS = 1000  # of a job
JOBS = {1: 1, 16: 16, 64: 10_000}  # batch size: images of the job
PEERS = ("stock", "ours", "fast")
LONG = 5  # a step that takes this many times `--seconds` is timed once


def pipeline_of(peer: str, network: str, batch_size: int, num_images: int) -> tuple[DDPMPipeline, str, float]:
    """A pipeline, ready for the job, its description, and the seconds that `enable_fast_sampling` took."""
    kind = DDPMPipeline if peer == "stock" else DDPMPipelineCustom
    pipe = kind(build(network), DDPMScheduler()).to(best_device())
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    description = pipe.enable_fast_sampling(num_images, STEPS, batch_size) if peer == "fast" else ""
    return pipe, description, time.perf_counter() - started


def chain(pipe: DDPMPipeline, batch_size: int, steps: int) -> Callable[[], object]:
    """A call that samples a batch."""
    return lambda: pipe(batch_size, num_inference_steps=steps, output_type="np")


def sample_once(peer: str, network: str, batch_size: int, num_images: int) -> None:
    """One step of the job, for another process to measure."""
    pipe, *_ = pipeline_of(peer, network, batch_size, num_images)
    chain(pipe, batch_size, 1)()


def seconds_of(call: Callable[[], object], long: float) -> float:
    """Seconds of the second of two calls, which has less to prepare; of the first where that is longer than `long`."""
    for _ in range(2):
        started = time.perf_counter()
        call()
        taken = time.perf_counter() - started
        if taken > long:
            break
    return taken


@torch.no_grad()
def prediction(pipe: DDPMPipeline, batch_size: int) -> Tensor:
    """ε̂ of the network in use at t = 500 of random numbers."""
    config, device = pipe.unet.config, pipe.unet.device
    shape = (batch_size, config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    network = getattr(pipe, "_fast_network", None) or pipe.unet
    return network(x, torch.tensor(500, device=device), return_dict=False)[0].float()


def compare(network: str, batch_size: int, num_images: int, seconds: float, repeats: int) -> dict[str, object]:
    """One row of the table."""
    pipes, described, set_up = {}, "", 0.0
    for peer in PEERS:
        pipes[peer], described, set_up = pipeline_of(peer, network, batch_size, num_images)
    print(f"{network}, batch {batch_size}, {num_images} images: {described}", flush=True)
    one_step = seconds_of(chain(pipes["stock"], batch_size, 1), LONG * seconds)
    # As many as time allows: what a chain costs once, such as the check of the weights, is little of 1000 steps.
    steps = min(max(round(seconds / one_step), 1), STEPS)
    chains = {peer: chain(pipe, batch_size, steps) for peer, pipe in pipes.items()}
    times = time_in_turns(chains, 1 if one_step > LONG * seconds else repeats)
    whole = STEPS / steps * num_images / batch_size  # chains of a job

    exact, fast = prediction(pipes["ours"], batch_size), prediction(pipes["fast"], batch_size)
    work = flops(lambda: prediction(pipes["ours"], 1)) * batch_size * steps
    peak = matmul_peak(pipes["fast"].sampling_dtype)
    return {
        "network": network,
        "batch": batch_size,
        "images": num_images,
        **{f"{peer}, ms/step": times[peer] / steps * 1e3 for peer in PEERS},
        "ours × stock": times["stock"] / times["ours"],
        "fast × stock": times["stock"] / times["fast"],
        "set-up of fast, s": set_up,
        "the job, fast × stock": whole * times["stock"] / (set_up + whole * times["fast"]),
        "fast: error of ε̂": float((fast - exact).norm() / exact.norm()),
        "of peak FLOP/s, ours": work / times["ours"] / matmul_peak(torch.float32),
        "of peak FLOP/s, fast": work / times["fast"] / peak,
        "fast": described,
    }


def main() -> None:
    """Print the tables as they come and write `sampling_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--batch_sizes", nargs="+", type=int, choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--num_images", type=int, help="of every job; default: 1, 16, or 10,000, by batch size")
    parser.add_argument("--seconds", type=float, default=0.3, help="about what a chain of stock takes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output_dir", type=Path, default=Path("bench-sampling"))
    options = parser.parse_args()

    # Set-up is what it takes on a machine that has compiled nothing yet; the processes of `peak_memory` find it done.
    compiled = tempfile.TemporaryDirectory()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name

    jobs = {size: max(options.num_images or JOBS[size], size) for size in options.batch_sizes}
    rows, memory = [], []
    for network in options.networks:
        for batch_size, num_images in jobs.items():
            rows.append(compare(network, batch_size, num_images, options.seconds, options.repeats))
            torch.compiler.reset()
        largest = max(jobs)
        peaks = {  # not of ours as it comes, which holds what stock holds
            f"{peer}, MiB": round(peak_memory(sample_once, peer, network, largest, jobs[largest]))
            for peer in ("stock", "fast")
        }
        memory.append({"network": network, "batch": largest, **peaks})
        print(f"\n{markdown_table(rows)}\n\n{markdown_table(memory)}\n", flush=True)
        write_results(options.output_dir / "sampling_speed.json", {"sampling": rows, "peak_memory": memory})


if __name__ == "__main__":
    main()
