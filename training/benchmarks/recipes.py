"""Recipes of training side by side: which options give the best images in the same time?

    python training/benchmarks/recipes.py --sets digits fashion --seconds 60 --clock cpu
    python training/benchmarks/recipes.py --sets cifar --cifar cifar10.parquet --recipes base min_snr --seeds 0 1

The recipes of a set train in turns of a few seconds, each for the same time in all: of the wall clock, or with `--clock
cpu` of CPU time, which other work on the machine disturbs less. The learning rate ends its decay as the time does.
Every model is sampled in the same number of steps from the same seeds and measured in the features of a network that
was trained on other images. `recipes.json` in the output folder keeps what is done: a second call does the rest.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common.image_sets import SETS, write_set
from common.measuring import compare, likelihood, read_pixels, sample, save_grid
from common.peers import PEERS
from torch import Tensor

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.recipe.rules import WIDTHS, networks
from ddpm_hf.training.deadline import TimedPlan
from ddpm_hf.training.log import TrainingLog
from ddpm_hf.training.loop import build_run
from ddpm_hf.training.setup import prepare
from ddpm_hf.training.state import exported_network
from ddpm_hf.training.step import accumulate_gradients, update_ema, update_weights

FEATURE_EXTRACTOR = Path(__file__).parents[1] / "feature_extractor.py"
SLICE = 2.0  # seconds of a turn
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.monotonic}


def network(*channels: int, layers: int = 1, **options: Any) -> dict[str, Any]:
    """A U-Net with attention at its lowest resolution."""
    plain = len(channels) - 1
    return {
        "block_out_channels": list(channels), "layers_per_block": layers, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D"] * plain + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * plain,
        **options,
    }  # fmt: skip


# The recipe of `ddpm-hf train --config digits`; the others differ from it in what they name.
BASE: dict[str, Any] = {
    "unet": network(16, 32, 64), "prediction_type": "v_prediction", "ddpm_beta_schedule": "squaredcos_cap_v2",
    "train_batch_size": 32, "learning_rate": 2e-3, "lr_warmup_steps": 100, "adam_beta1": 0.9, "adam_beta2": 0.99,
    "adam_weight_decay": 1e-4, "use_ema": True, "ema_max_decay": 0.995,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "base": {},
    "epsilon": {"prediction_type": "epsilon"},
    "x_0": {"prediction_type": "sample"},
    "min_snr": {"loss_weighting": "min_snr"},
    "min_snr_v": {"loss_weighting": "min_snr_v"},
    "linear_schedule": {"ddpm_beta_schedule": "linear"},
    "laplace_schedule": {"ddpm_beta_schedule": "laplace"},
    "lr_4e-3": {"learning_rate": 4e-3},
    "lr_8e-3": {"learning_rate": 8e-3},
    "batch_16": {"train_batch_size": 16},
    "batch_64": {"train_batch_size": 64},
    "batch_128": {"train_batch_size": 128, "learning_rate": 4e-3},
    "warmup_30": {"lr_warmup_steps": 30},
    "lr_linear": {"lr_scheduler": "linear"},
    "lr_constant": {"lr_scheduler": "constant_with_warmup"},
    "ema_0.98": {"ema_max_decay": 0.98},
    "ema_0.999": {"ema_max_decay": 0.999, "ema_power": 0.9},
    "scale_shift": {"unet": network(16, 32, 64, resnet_time_scale_shift="scale_shift")},
    "width_8": {"unet": network(8, 16, 32)},
    "width_32": {"unet": network(32, 64, 64)},
    "two_levels": {"unet": network(32, 64)},
    "layers_2": {"unet": network(16, 32, 64, layers=2)},
    "network_32": {"unet": network(16, 32, 64, 64)},
    "flips": {"random_flip": True},
    # As a plan has them at 32×32: networks, rates, batch, loss and averages of the rules, mirrored.
    **{
        f"plan_{width}": {
            "unet": unet,
            "train_batch_size": 8,
            "learning_rate": rate,
            "lr_warmup_steps": 30,
            "loss_weighting": "min_snr_v",
            "snr_gamma": 20.0,
            "random_flip": True,
            "ema_max_decay": 0.9999,
            "ema_widths": [0.03, 0.06, 0.12],
        }
        for width, unet, rate in zip(WIDTHS, networks(32), (2e-3, 2e-3, 1.3e-3, 1e-3, 6.7e-4), strict=False)
    },
}
RECIPES |= {
    "plan_16_4e-3": {**RECIPES["plan_16"], "learning_rate": 4e-3},
    "plan_16_epsilon": {
        **RECIPES["plan_16"],
        "prediction_type": "epsilon",
        "loss_weighting": "uniform",
        "snr_gamma": None,
    },
    "plan_16_snr": {**RECIPES["plan_16"], "loss_weighting": "snr", "snr_gamma": None},
    "plan_16_uniform": {**RECIPES["plan_16"], "loss_weighting": "uniform", "snr_gamma": None},
    **{
        f"plan_16_batch_{n}": {
            **RECIPES["plan_16"],
            "loss_weighting": "uniform",
            "snr_gamma": None,
            "train_batch_size": n,
        }
        for n in (4, 32)
    },
}


@dataclass(frozen=True, eq=False)
class Task:
    """One model to train and measure."""

    recipe: str
    data: str
    seed: int
    work: Path
    options: argparse.Namespace

    @property
    def name(self) -> str:
        """Of its entry in the results, and of its files."""
        return f"{self.data}-{self.recipe}-{self.seed}-{self.options.seconds:g}s"


def train(task: Task) -> Generator[None, None, tuple[DDPMPipelineCustom, dict[str, float]]]:
    """Train by a recipe, a slice of the time at each `next`; set-up and export do not count."""
    image_set, clock, seconds = SETS[task.data], CLOCKS[task.options.clock], task.options.seconds
    config = TrainConfig(
        train_data_dir=str(task.work / task.data / "train"), cache_dir=str(task.work / "cache"),
        resolution=image_set.resolution, channels=image_set.channels, output_dir=str(task.work / "run"),
        overwrite_output_dir=True, report_to=["none"], seed=task.seed,
        **{**BASE, **RECIPES[task.recipe]},
    )  # fmt: skip
    setup = prepare(config)
    images = load_images(config, setup.source, show_progress=False)
    run = build_run(config, setup, TimedPlan(config, len(images), 1), images)
    log = TrainingLog(setup.accelerator, config, 0)
    batches = images.batches(0, config.batch_size, config.batch_size, config.seed)
    spent = 0.0
    while spent < seconds:
        began = before = clock()
        while before - began < SLICE and spent < seconds:
            run.plan = replace(run.plan, fraction=spent / seconds)
            accumulate_gradients(run, run.unet, batches, log)
            update_weights(run, log)
            update_ema(run)
            run.advance(0.0)
            now = clock()
            spent, before = spent + now - before, now
        yield
    facts = {"seconds": round(spent, 1), "updates": run.step, "images_seen": run.images_seen}
    return DDPMPipelineCustom(exported_network(run), run.scheduler), facts


def take_turns(tasks: list[Task]) -> Iterator[tuple[Task, DDPMPipelineCustom, dict[str, float]]]:
    """Train all of them, a slice each in turn, so that a busy machine slows all of them alike."""
    running = {task: train(task) for task in tasks}
    while running:
        for task, training in list(running.items()):
            try:
                next(training)
            except StopIteration as end:
                del running[task]
                yield task, *end.value


def run_peer(task: Task) -> tuple[Tensor, dict[str, float]]:
    """Train another project's model, in one go, and sample it."""
    name, _, tuned = task.recipe.partition("-")
    options, image_set = task.options, SETS[task.data]
    extra = {
        "train_unconditional": {"script": options.stock_script, "network": network(16, 32, 64)},
        "ddpm_hf_train": {"steps": options.steps},
    }.get(name, {})
    samples, facts = PEERS[name](
        task.work / task.data / "train", image_set.resolution, image_set.channels, options.seconds,
        CLOCKS[options.clock], options.num_images, task.work, tuned=bool(tuned), **extra,
    )  # fmt: skip
    return samples, facts | {"seconds": round(facts["seconds"], 1)}


def measure(task: Task, samples: Tensor) -> dict[str, float]:
    """Draw and measure samples."""
    save_grid(samples, task.work / f"{task.name}.png")
    return compare(samples, task.work / task.data, task.work / f"extractor-{SETS[task.data].extractor}")


def outcomes(tasks: list[Task]) -> Iterator[tuple[Task, dict[str, float]]]:
    """What came of each task: ours in turns, then other projects'."""
    for task, pipeline, facts in take_turns([task for task in tasks if task.recipe in RECIPES]):
        pipeline.save_pretrained(task.work / "models" / task.name)  # for other samplers than this one
        found = measure(task, sample(pipeline, task.options.num_images, task.options.steps))
        yield task, facts | found | likelihood(pipeline, read_pixels(task.work / task.data / "held_out"))
    for task in tasks:
        if task.recipe not in RECIPES:
            samples, facts = run_peer(task)
            yield task, facts | measure(task, samples)


def make_extractor(name: str, options: argparse.Namespace) -> None:
    """A classifier of other images than those that it measures, unless it exists."""
    folder, source = options.output_dir / f"extractor-{name}", {"photographs": "cifar", "pictures": "pictures"}[name]
    if folder.is_dir():
        return
    write_set(source, options.output_dir / source, options.fashion, options.cifar)
    images = str(options.output_dir / source / "train")
    command = [sys.executable, str(FEATURE_EXTRACTOR), "--dataset", images, "--output_dir", str(folder)]
    subprocess.run([*command, "--resolution", "32", "--updates", str(options.extractor_updates)], check=True)


def table(results: dict[str, Any]) -> str:
    """The results in Markdown, the best of each set first."""
    lines = [
        "| set | recipe | seed | seconds | updates | images seen | Fréchet distance | bits/dim | copies |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(results.values(), key=lambda r: (r["set"], r["budget"], r["frechet"])):
        bits = f"{r['bits_per_dim']:.2f} ± {r['bits_per_dim_error']:.2f}" if "bits_per_dim" in r else ""
        lines.append(
            f"| {r['set']} | {r['recipe']} | {r['seed']} | {r['seconds']:.0f} | {r['updates']:,} | "
            f"{r['images_seen']:,} | {r['frechet']:.2f} ± {r['frechet_error']:.2f} | {bits} | {r['copies']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["digits"])
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--peers", nargs="+", choices=[n + t for n in PEERS for t in ("", "-tuned")], default=[])
    parser.add_argument("--stock_script", type=Path, help="diffusers' train_unconditional.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num_images", type=int, default=512, help="samples of each model")
    parser.add_argument("--steps", type=int, default=12, help="network calls per sample")
    parser.add_argument("--extractor_updates", type=int, default=2000)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="idx files")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10, or other photographs in classes, as a parquet file")
    parser.add_argument("--output_dir", type=Path, default=Path("bench-recipes"))
    return parser.parse_args()


def main() -> None:
    """Do what `recipes.json` does not have yet; print the table."""
    options = parse()
    options.output_dir = options.output_dir.absolute()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "recipes.json"
    results: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for name in options.sets:
        write_set(name, options.output_dir / name, options.fashion, options.cifar)
        make_extractor(SETS[name].extractor, options)
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        for name in options.sets:
            tasks = [
                Task(recipe, name, seed, options.output_dir, options) for recipe in options.recipes + options.peers
            ]
            for task, result in outcomes([task for task in tasks if task.name not in results]):
                place = {"set": name, "recipe": task.recipe, "seed": seed, "budget": options.seconds}
                results[task.name] = place | {"clock": options.clock} | result
                print(json.dumps(results[task.name]), flush=True)
                file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (options.output_dir / "recipes.md").write_text(table(results), "utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
