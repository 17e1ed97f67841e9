"""Quality against the number of steps: stock schedulers and ours, on one network and one set of seeds.

    python training/benchmarks/few_steps.py --model ddpm-digits --output_dir bench-few-digits
    python training/benchmarks/few_steps.py --fashion_mnist FOLDER-OF-IDX-FILES --output_dir bench-few-fashion

The second form first trains a network on Fashion-MNIST at 16×16, with the paper's linear schedule and ε-prediction,
unless the output folder has one from an earlier run.

1. Calibrate the model on 64 images, unless it is calibrated.
2. Sample with every setting and every K; image i has the x_T of seed i in all of them.
3. Fréchet distance to the real images, in the 64 features of a small CNN that is trained here to read their classes.
   Bits/dim where the chain has a likelihood.
4. Write `few_steps.json`, `few_steps.png` and a Markdown table.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
from common.scoring import fit_classifier, score
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.pixels import normalize
from ddpm_hf.evaluation.calibration import calibrate, recommended_steps, save_calibrated
from ddpm_hf.evaluation.likelihood import bits_per_dim
from ddpm_hf.training.loop import train

FASHION_RECIPE = [
    "--resolution", "16", "--channels", "1", "--center_crop", "--prediction_type", "epsilon",
    "--ddpm_beta_schedule", "linear", "--train_batch_size", "32", "--max_train_steps", "9000",
    "--learning_rate", "2e-3", "--lr_warmup_steps", "100", "--adam_beta1", "0.9", "--adam_beta2", "0.99",
    "--adam_weight_decay", "1e-4", "--use_ema", "--ema_max_decay", "0.998", "--ddpm_num_inference_steps", "50",
    "--unet", json.dumps({
        "block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 8,
        "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    }),
]  # fmt: skip

# name: scheduler class, changes to its configuration, options of the call
SETTINGS = {
    "stock DDPM, β̃": (DDPMScheduler, {"variance_type": "fixed_small", "timestep_spacing": "leading"}, {}),
    "stock DDPM, β": (DDPMScheduler, {"variance_type": "fixed_large", "timestep_spacing": "leading"}, {}),
    "stock DDIM": (DDIMScheduler, {"timestep_spacing": "leading"}, {}),
    "stock DPM-Solver++": (DPMSolverMultistepScheduler, {"timestep_spacing": "linspace"}, {}),
    "optimal variance": (DDPMSchedulerCustom, {"variance_type": "optimal", "timestep_spacing": "linspace"}, {}),
    "optimal variance, best timesteps": (
        DDPMSchedulerCustom, {"variance_type": "optimal"}, {"timesteps": "optimal"}
    ),
    "second order, eta = 0": (
        DDPMSchedulerCustom, {"variance_type": "fixed_small"}, {"timesteps": "linspace", "eta": 0.0, "solver_order": 2}
    ),
    "second order, eta = 1": (
        DDPMSchedulerCustom, {"variance_type": "fixed_small"}, {"timesteps": "linspace", "eta": 1.0, "solver_order": 2}
    ),
}  # fmt: skip
REFERENCE = "stock DDPM, β̃"
RECOMMENDED = "second order, eta = 0"


def labelled_digits() -> tuple[Tensor, Tensor]:
    """The digits as the default job sees them: uint8 (1797, 1, 16, 16), and their classes."""
    return load_images(parse_train_config([]), show_progress=False).pixels, torch.tensor(load_digits().target)


def labelled_fashion(idx_folder: Path, output_dir: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Fashion-MNIST's training set at 16×16, its classes, and the flags that train on it."""
    import datasets

    file = output_dir / "fashion-mnist.parquet"
    arrays = {}
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        with gzip.open(idx_folder / f"train-{kind}-ubyte.gz") as stream:
            arrays[header] = np.frombuffer(stream.read(), np.uint8, offset=header)
    if not file.exists():
        features = datasets.Features({"image": datasets.Image()})
        rows = {"image": list(arrays[16].reshape(-1, 28, 28))}
        datasets.Dataset.from_dict(rows, features).to_parquet(file)
    flags = ["--dataset_name", str(file), *FASHION_RECIPE]
    pixels = load_images(parse_train_config(flags), show_progress=True).pixels
    return pixels, torch.from_numpy(arrays[8].astype(np.int64)), flags


def sample(pipe: DDPMPipelineCustom, number: int, steps: int, options: dict, title: str) -> Tensor:
    """Images in [-1, 1] from seeds 0, 1, …; (N, C, H, W)."""
    images = []
    for i in tqdm(range(0, number, 125), desc=f"{title}, K = {steps}", leave=False):
        seeds = [torch.Generator().manual_seed(k) for k in range(i, min(i + 125, number))]
        images.append(pipe(len(seeds), seeds, steps, "pt", **options).images)
    return torch.cat(images).float() * 2 - 1


def with_scheduler(pipe: DDPMPipelineCustom, kind: type, changes: dict) -> DDPMPipelineCustom:
    """The same network behind another scheduler."""
    scheduler = kind.from_config(pipe.scheduler.config, **changes)
    other = DDPMPipelineCustom(pipe.unet, DDPMSchedulerCustom.from_config(pipe.scheduler.config))
    other.scheduler = scheduler  # set afterwards: the pipeline would replace a stock DDPMScheduler by ours
    other.set_progress_bar_config(disable=True)
    return other


def bits(pipe: DDPMPipelineCustom, pixels: Tensor, steps: int) -> dict[str, float]:
    """Bits/dim of K steps on 64 images, for the variances that are no network's."""
    options = {"num_images": 64, "show_progress": False}
    spread = DDPMPipelineCustom(pipe.unet, DDPMSchedulerCustom.from_config(pipe.scheduler.config))
    return {
        name: round(bits_per_dim(spread, pixels, num_inference_steps=steps, **options, **chain).total, 3)
        for name, chain in {
            "β̃": {"timesteps": "linspace", "variance_type": "fixed_small"},
            "β": {"timesteps": "linspace", "variance_type": "fixed_large"},
            "optimal variance": {"timesteps": "linspace", "variance_type": "optimal"},
            "optimal variance, best timesteps": {"timesteps": "optimal", "variance_type": "optimal"},
        }.items()
    }


def plot(results: dict, file: Path) -> None:
    """Fréchet distance, and bits/dim, against K."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, table, label in ((left, "frechet", "Fréchet distance"), (right, "bits_per_dim", "bits/dim")):
        for name, values in results[table].items():
            style = {"linewidth": 2.5, "color": "black"} if name == RECOMMENDED else {"linewidth": 1.2}
            axes.plot([int(K) for K in values], list(values.values()), marker="o", label=name, **style)
        axes.set(xlabel="steps K", ylabel=label, xscale="log", yscale="log")
        axes.set_xticks(ticks := results["steps"], [str(K) for K in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    reference = results["reference"]["frechet"]
    left.axhline(reference, color="gray", linestyle="--", label=f"stock DDPM, {results['reference']['steps']} steps")
    for axes in (left, right):
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(file)


def markdown(results: dict) -> str:
    """The tables, for a README or a card."""
    lines = []
    for table, title in (("frechet", "Fréchet distance"), ("bits_per_dim", "bits/dim")):
        lines += [f"| {title} | " + " | ".join(f"K = {K}" for K in results["steps"]) + " |"]
        lines += ["|---" * (len(results["steps"]) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(str(v) for v in values.values()) + " |"
            for name, values in results[table].items()
        ]
        lines += [""]
    return "\n".join(lines)


def main() -> None:
    """Train if need be, calibrate, sample and score; results are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model trained on the digits, e.g. ddpm-digits")
    parser.add_argument("--fashion_mnist", type=Path, metavar="FOLDER", help="Fashion-MNIST's four idx files instead")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50])
    parser.add_argument("--reference_steps", type=int, default=1000, help="of stock's ancestral sampling")
    options = parser.parse_args()
    if (options.model is None) == (options.fashion_mnist is None):
        parser.error("pass one of --model and --fashion_mnist")
    options.output_dir.mkdir(parents=True, exist_ok=True)

    # 1. Images, network, features
    if options.fashion_mnist is None:
        model, (pixels, labels) = options.model, labelled_digits()
    else:
        model = options.output_dir / "model"
        pixels, labels, flags = labelled_fashion(options.fashion_mnist, options.output_dir)
        if not (model / "model_index.json").exists():
            train(parse_train_config([*flags, "--output_dir", str(model)]))
    real = normalize(pixels)
    classifier, accuracy = fit_classifier(real, labels)
    pipe = DDPMPipelineCustom.from_pretrained(model)
    if "_calibration" not in pipe.scheduler.config:
        calibrate(pipe, pixels, num_images=64)
        save_calibrated(pipe, model)
    likelihood_pipe = DDPMPipelineCustom.from_pretrained(model)
    pipe.unet.compile()  # a third of the time

    # 2. The long chain that all are measured by, then every setting at every K
    n, steps = options.num_images, options.steps
    results = {
        "model": model.name, "num_images": n, "steps": steps, "classifier_accuracy": round(accuracy, 4),
        "real_against_real": score(classifier, real[:n], real[n:])["frechet"],
        "recommended_steps_by_likelihood": recommended_steps(pipe.scheduler),
        "frechet": {name: {} for name in SETTINGS}, "bits_per_dim": {}, "reference": {},
    }  # fmt: skip

    def frechet(name: str, K: int) -> float:
        kind, changes, call = SETTINGS[name]
        started = time.monotonic()
        images = sample(with_scheduler(pipe, kind, changes), n, K, call, name)
        distance = score(classifier, images, real)["frechet"]
        print(
            f"{name:35s} K = {K:4d}  Fréchet distance {distance:8.3f}  {time.monotonic() - started:5.0f} s", flush=True
        )
        return distance

    results["reference"] = {"steps": options.reference_steps, "frechet": frechet(REFERENCE, options.reference_steps)}
    for K in steps:
        for name in SETTINGS:
            results["frechet"][name][K] = frechet(name, K)
        for name, value in bits(likelihood_pipe, pixels, K).items():
            results["bits_per_dim"].setdefault(name, {})[K] = value

    # 3. What people look at
    (options.output_dir / "few_steps.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )
    plot(results, options.output_dir / "few_steps.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
