"""The cost of a step beside the network, and of `add_noise`: diffusers' `DDPMScheduler` and ours.

    python training/benchmarks/scheduler_step.py --output_dir bench-scheduler

Whole chains of 1000 steps, in turns, the trajectory's own set-up included. The network is a constant. Random numbers
cost both the same and are timed apart: "beyond" is what a step takes beyond them.
"""

import argparse
from pathlib import Path

import torch
from common.timing import best_device, markdown_table, time_in_turns, write_results
from diffusers import DDPMScheduler
from torch import Tensor

from ddpm_hf import DDPMSchedulerCustom

STEPS = 1000


def run_chain(kind: type[DDPMScheduler | DDPMSchedulerCustom], output: Tensor) -> Tensor:
    """x_0 at the end of a chain whose network always predicts `output`."""
    scheduler = kind(variance_type="fixed_large")
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator(output.device).manual_seed(0)
    x_t = torch.randn(output.shape, generator=generator, device=output.device)
    for t in scheduler.timesteps:
        x_t = scheduler.step(output, t, x_t, generator=generator).prev_sample
    return x_t


def draw_noise(output: Tensor) -> None:
    """All the random numbers of a chain, and nothing else."""
    generator = torch.Generator(output.device).manual_seed(0)
    for _ in range(STEPS):
        torch.randn(output.shape, generator=generator, device=output.device)


def compare_step(shape: tuple[int, ...], repeats: int) -> dict[str, object]:
    """Microseconds per step, and what the outputs differ by."""
    output = torch.randn(shape, device=best_device())
    seconds = time_in_turns(
        {
            "stock": lambda: run_chain(DDPMScheduler, output),
            "ours": lambda: run_chain(DDPMSchedulerCustom, output),
            "random": lambda: draw_noise(output),
        },
        repeats,
    )
    micro = {name: value / STEPS * 1e6 for name, value in seconds.items()}
    beyond = {name: micro[name] - micro["random"] for name in ("stock", "ours")}
    return {
        "shape": "×".join(map(str, shape)),
        "random numbers, µs": micro["random"],
        "stock, µs": micro["stock"],
        "ours, µs": micro["ours"],
        "ours / stock beyond": beyond["ours"] / beyond["stock"],
        "largest difference": _difference(run_chain(DDPMScheduler, output), run_chain(DDPMSchedulerCustom, output)),
    }


def compare_add_noise(shape: tuple[int, ...], repeats: int) -> dict[str, object]:
    """Microseconds per call with a timestep per image, in float32."""
    device = best_device()
    x_0, noise = torch.randn(2, *shape, device=device)
    t = torch.randint(0, 1000, shape[:1], device=device)
    stock, ours = DDPMScheduler(), DDPMSchedulerCustom()
    seconds = time_in_turns(
        {"stock": lambda: stock.add_noise(x_0, noise, t), "ours": lambda: ours.add_noise(x_0, noise, t)}, repeats, 200
    )
    return {
        "shape": "×".join(map(str, shape)),
        "stock, µs": seconds["stock"] * 1e6,
        "ours, µs": seconds["ours"] * 1e6,
        "ours / stock": seconds["ours"] / seconds["stock"],
        "largest difference": _difference(stock.add_noise(x_0, noise, t), ours.add_noise(x_0, noise, t)),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@torch.no_grad()
def main() -> None:
    """Print two tables and write `scheduler_step.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output_dir", type=Path, default=Path("bench-scheduler"))
    options = parser.parse_args()

    shapes = [(1, 3, 8, 8), (1, 3, 32, 32), (16, 3, 32, 32), (64, 3, 32, 32)]
    steps = [compare_step(shape, options.repeats) for shape in shapes]
    print(f"step\n{markdown_table(steps)}\n")
    noise = [compare_add_noise(shape, options.repeats) for shape in shapes]
    print(f"add_noise\n{markdown_table(noise)}\n")
    write_results(options.output_dir / "scheduler_step.json", {"step": steps, "add_noise": noise})


if __name__ == "__main__":
    main()
