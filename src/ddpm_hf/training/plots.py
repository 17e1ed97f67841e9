"""The pictures that a training run leaves: samples beside real images, the curves of loss and validation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def save_pictures(
    output_dir: Path, samples: Image.Image, real: Image.Image, steps: Sequence[int], losses: Sequence[float]
) -> None:
    """What a finished run shows of itself: both grids, alone and side by side, and the loss of each logged step."""
    samples.save(output_dir / "samples.png")
    real.save(output_dir / "real.png")
    save_side_by_side(samples, real, output_dir / "samples_and_real.png")
    save_loss_curve(steps, losses, output_dir / "loss.png")


def save_side_by_side(samples: Image.Image, real: Image.Image, file: Path) -> None:
    """Two grids, titled, in one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), dpi=110, layout="constrained")
    for axes, title, image in zip(
        figure.subplots(1, 2), ("Samples of the model", "Real images"), (samples, real), strict=True
    ):
        axes.imshow(np.asarray(image))
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(file)


def save_loss_curve(steps: Sequence[int], losses: Sequence[float], file: Path) -> None:
    """The loss against optimizer updates, with a running mean over a twentieth of the run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, marker=".", markersize=2, label="loss")
    window = max(1, len(losses) // 20)
    if len(losses) >= 2 * window:
        mean = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(steps[window - 1 :], mean, color="tab:blue", label=f"mean of {window} entries")
    axes.set_xlabel("optimizer updates")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file)


def save_validation_curves(entries: Sequence[Mapping[str, float]], best: int, file: Path) -> None:
    """bits/dim with its standard error and the Fréchet distance against optimizer updates, the best one marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [e["step"] for e in entries]
    bits, errors, distances, seen = (
        [e.get(f"eval_{name}", math.nan) for e in entries]
        for name in ("bits_per_dim", "bits_per_dim_se", "frechet", "frechet_of_training_images")
    )
    left.errorbar(steps, bits, errors, color="tab:blue", ecolor="lightgrey", marker=".")
    left.set_ylabel("bits/dim of held-out images")
    right.plot(steps, distances, color="tab:blue", marker=".", label="samples")
    right.plot(steps, seen, color="grey", linestyle="--", label="training images")
    right.set_ylabel("Fréchet distance to held-out images")
    right.set_yscale("log")
    right.legend()
    for axes in (left, right):
        axes.axvline(best, color="tab:green", alpha=0.5)
        axes.set_xlabel("optimizer updates (green: the best)")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(file)
