"""What people look at: grids of images and the loss curve."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import Tensor

MIN_SIDE = 48  # smaller images are enlarged by whole factors, so that their pixels can be seen


def check_plotting() -> None:
    """Raise a ValueError unless the plots at the end of a run can be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the plots need matplotlib: pip install 'ddpm-hf[train]'.")


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """uint8 of shape (B, C, H, W) → PIL images."""
    arrays = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a[..., 0] if a.shape[-1] == 1 else a) for a in arrays]


def image_grid(images: Sequence[Image.Image]) -> Image.Image:
    """The images in reading order, in a grid as square as it gets.

    Raises:
        ValueError: for no images.
    """
    if not images:
        raise ValueError("a grid needs at least one image.")
    width, height = images[0].size
    factor = max(1, math.ceil(MIN_SIDE / min(width, height)))
    tiles = [
        ImageOps.expand(
            i.convert("RGB").resize((width * factor, height * factor), Image.Resampling.NEAREST), 1, "white"
        )
        for i in images
    ]
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    blank = Image.new("RGB", tiles[0].size, "white")
    return make_image_grid(tiles + [blank] * (rows * columns - len(tiles)), rows, columns)


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
