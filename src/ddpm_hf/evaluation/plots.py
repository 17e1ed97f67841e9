"""Plots of an evaluation: bits/dim by timestep, rate and distortion, samples beside their nearest training images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.pictures import image_grid, to_pil
from .likelihood import BitsPerDim, RateDistortion

SHOWN = 16  # samples of each kind in the picture of nearest neighbours


def save_bits_per_dim(bits: BitsPerDim, file: Path) -> None:
    """The terms of the bound against t, as in Fig. 2 of arXiv 2102.09672: L_{t-1}, and L_0 at the last t."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    visited = ~bits.terms.isnan()
    t = torch.tensor(bits.timesteps)[visited]
    axes.plot(t, bits.terms[visited], color="tab:blue", linewidth=1, marker=".", markersize=2)
    axes.set_yscale("log")
    axes.set_xlabel("timestep t")
    axes.set_ylabel("bits/dim of the step from t")
    K = len(bits.timesteps)
    axes.set_title(f"{bits.total:.3f} ± {bits.standard_error:.3f} bits/dim, K = {K}, {bits.num_images:,} images")
    axes.grid(alpha=0.3, which="both")
    figure.savefig(file)


def save_rate_distortion(curve: RateDistortion, file: Path) -> None:
    """Fig. 5 of arXiv 2006.11239: distortion and rate along the reverse process, and one against the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    done = np.arange(len(curve.timesteps))
    panels = [
        (done, curve.distortion, "reverse steps done", "distortion (RMSE, 0 to 255)"),
        (done, curve.rate, "reverse steps done", "rate (bits/dim)"),
        (curve.rate, curve.distortion, "rate (bits/dim)", "distortion (RMSE, 0 to 255)"),
    ]
    for axes, (x, y, x_label, y_label) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.plot(x, y, color="tab:blue")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(file)


def save_neighbours(samples: Tensor, train: Tensor, neighbours: Tensor, distances: Tensor, file: Path) -> None:
    """Samples, each beside its nearest training images: the first samples, and those nearest to the training set.

    Args:
        samples: uint8 (N, C, H, W).
        train: the training images, uint8 (M, C, H, W).
        neighbours: the indices of those nearest to each sample, int64 (N, k).
        distances: (N,), of each sample to its nearest neighbour.
    """
    from matplotlib.figure import Figure

    rows = {
        "The first samples, each left of its nearest training images": torch.arange(len(samples))[:SHOWN],
        "The samples nearest to the training set": distances.argsort(stable=True)[:SHOWN],
    }
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    for axes, (title, chosen) in zip(figure.subplots(2, 1), rows.items(), strict=True):
        shown, beside = samples[chosen], train[neighbours[chosen]]
        narrow, wide = (torch.full_like(shown[..., : max(1, shown.shape[-1] // part)], 255) for part in (8, 2))
        strips = torch.cat([shown, narrow, *beside.unbind(1), wide], dim=-1)
        axes.imshow(np.asarray(image_grid(to_pil(strips))))
        axes.set_title(title)
        axes.set_axis_off()
    figure.savefig(file)
