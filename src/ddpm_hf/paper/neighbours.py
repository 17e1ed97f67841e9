"""Figures 12 and 15: samples beside their nearest training images."""

from __future__ import annotations

from pathlib import Path

import torch

from ..evaluation.metrics.memorization import memorization, nearest_neighbours
from ..evaluation.plots import save_neighbours
from ..evaluation.predictions import draw_indices
from .figure import Drawn, PaperFigure
from .job import Job

NEIGHBOURS = 3
HELD_OUT = 1000


def _draw(job: Job, file: Path) -> Drawn:
    if job.train is None:
        raise ValueError("nearest neighbours need the training images: pass --dataset or --train_data_dir.")
    samples, train, held_out = job.samples.images, job.train.pixels, job.held_out.pixels
    found = nearest_neighbours(samples, train, NEIGHBOURS, show_progress=False)
    chosen = draw_indices(len(held_out), min(len(held_out), HELD_OUT), job.config.seed)
    exclude = None if job.unseen else chosen
    real = nearest_neighbours(held_out[chosen], train, 1, exclude=exclude, show_progress=False).distances[:, 0]
    test = memorization(found.distances[:, 0], real)
    save_neighbours(samples, train, found.indices, found.distances[:, 0], file)
    levels = torch.stack([found.distances[:, 0].median(), real.median()]) / samples[0].numel() ** 0.5
    return Drawn({
        "count": len(samples), "train": f"{len(train):,}", "share": f"{test.share:.1%}",
        "error": f"{test.standard_error:.1%}", "sample": f"{levels[0]:.1f}", "real": f"{levels[1]:.1f}",
        "held": "unseen images" if job.unseen else "training images, each compared with all the others",
    })  # fmt: skip


FIGURE = PaperFigure(
    name="neighbours",
    title="Nearest training images",
    place="Fig. 12, 15",
    text="Each sample stands left of the three of {train} training images that are nearest to it in pixels: if the "
    "model copied, the pairs would be equal. "
    "The median distance is {sample} levels of 255 per pixel for samples, and {real} for {held}. "
    "{share} ± {error} of {count} samples are nearer to a training image than 95 % of those are; a model that "
    "draws new images has 5 %.",
    functions=(
        "ddpm_hf.evaluation.metrics.memorization.nearest_neighbours",
        "ddpm_hf.evaluation.metrics.memorization.memorization",
    ),
    draw=_draw,
    options=("num_images", "num_inference_steps", "batch_size"),
    needs_images=True,
    uses_samples=True,
)
