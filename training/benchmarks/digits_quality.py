"""Quality of the default job beside the recipe of diffusers' `train_unconditional.py`, at equal network and time.

    python training/benchmarks/digits_quality.py --output_dir bench-digits

1. Train our preset, and note its wall-clock time.
2. Train the same network on the same images for the same time with the script's defaults: ε-prediction, linear
   schedule, batch 16, AdamW at 1e-4 with 500 steps of warm-up and cosine decay, EMA up to 0.9999. (Its recipe in our
   loop: the script itself forces RGB and knows no digits.)
3. Sample both, ours with our pipeline, the other one with stock diffusers, in the same number of steps.
4. Score with a classifier of real digits that neither has seen: how sure it is, how even the ten classes are, and the
   Fréchet distance between its features of samples and of real images. For comparison, one half of the real images is
   scored against the other.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMPipeline
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.config import parse_train_config
from ddpm_hf.data import load_images, to_unit_range
from ddpm_hf.training import train

PRESET = Path(__file__).parents[1] / "configs" / "digits.yaml"
STOCK_RECIPE = [
    "--prediction_type", "epsilon", "--ddpm_beta_schedule", "linear", "--timestep_spacing", "leading",
    "--train_batch_size", "16", "--learning_rate", "1e-4", "--lr_warmup_steps", "500", "--adam_beta1", "0.95",
    "--adam_beta2", "0.999", "--adam_weight_decay", "1e-6", "--ema_max_decay", "0.9999",
]  # fmt: skip


class Classifier(nn.Module):
    """A small CNN; its 64 features before the last layer are those of the Fréchet distance."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten classes."""
        return self.head(self.features(x))


def train_classifier(x: Tensor, y: Tensor) -> Classifier:
    """Fit on four fifths of the scans; prints the accuracy on the rest."""
    torch.manual_seed(1234)
    order = torch.randperm(len(x))
    held_out, seen = order[: len(x) // 5], order[len(x) // 5 :]
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    for _ in range(40):
        for batch in seen[torch.randperm(len(seen))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        accuracy = float((net(x[held_out]).argmax(1) == y[held_out]).float().mean())
    print(f"classifier: {accuracy:.1%} on held-out scans")
    return net


@torch.no_grad()
def score(net: Classifier, x: Tensor, real: Tensor) -> dict[str, object]:
    """Fréchet distance, confidence and class counts of images in [-1, 1]."""
    a, b = net.features(x).double().numpy(), net.features(real).double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr sqrt(A B) is the sum of the roots of the eigenvalues, which are never negative for two covariances.
    trace_of_root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * trace_of_root
    p = net(x).softmax(1)
    counts = torch.bincount(p.argmax(1), minlength=10)
    return {
        "frechet": round(float(frechet), 3),
        "sure_above_0.9": round(float((p.max(1).values > 0.9).float().mean()), 4),
        "counts": counts.tolist(),
    }


def sample(pipe: DDPMPipeline | DDPMPipelineCustom, number: int, steps: int) -> Tensor:
    """Images in [-1, 1] from seeds 0, 1, …; (N, 1, 16, 16)."""
    pipe.set_progress_bar_config(disable=True)
    batches = [
        pipe(128, [torch.Generator().manual_seed(i + k) for k in range(128)], steps, "np").images
        for i in range(0, number, 128)
    ]
    return torch.from_numpy(np.concatenate(batches)).permute(0, 3, 1, 2).float() * 2 - 1


def main() -> None:
    """Train, sample and score every recipe; prints a table and writes `results.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("bench-digits"))
    parser.add_argument("--num_images", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--max_train_steps", type=int, help="shorten the training of ours, for a trial")
    parser.add_argument("--also", action="append", default=[], metavar="FLAGS", help="our preset with other flags")
    options = parser.parse_args()

    def run(name: str, flags: list[str], steps: int | None = None) -> float:
        """Train a recipe; returns the seconds it took."""
        flags = [*flags, "--output_dir", str(options.output_dir / name), "--overwrite_output_dir"]
        flags += ["--max_train_steps", str(steps)] if steps else []
        started = time.monotonic()
        train(parse_train_config(flags, PRESET))
        return time.monotonic() - started

    def run_for(seconds: float, name: str, flags: list[str]) -> float:
        """Train a recipe for about so many seconds: two short runs tell how many updates that is."""
        overhead, trial = run("trial", flags, 1), 150
        per_step = (run("trial", flags, 1 + trial) - overhead) / trial
        return run(name, flags, int((seconds - overhead) / per_step))

    budget = run("ours", [], options.max_train_steps)
    recipes = {"stock recipe": STOCK_RECIPE, **{flags: flags.split() for flags in options.also}}
    seconds = {"ours": budget} | {n: run_for(budget, n.strip("-"), flags) for n, flags in recipes.items()}

    images = load_images(parse_train_config([], PRESET), show_progress=False)
    real = to_unit_range(images.pixels)
    classifier = train_classifier(real, torch.from_numpy(load_digits().target))
    halves = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).chunk(2)
    results = {"real, one half against the other": score(classifier, real[halves[0]], real[halves[1]])}
    for name, duration in seconds.items():
        loader = DDPMPipeline if name == "stock recipe" else DDPMPipelineCustom
        pipe = loader.from_pretrained(options.output_dir / name.strip("-"))
        samples = sample(pipe, options.num_images, options.num_inference_steps)
        results[f"{name} ({duration:.0f} s)"] = score(classifier, samples, real)
    print(f"\n{options.num_images} samples, {options.num_inference_steps} steps")
    for name, result in results.items():
        print(f"{name:60s} {result}")
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
