"""Figures 8 and 9: between two images, at one t, and from coarse to fine."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..data.pixels import to_uint8
from ..restoration.edit import interpolate
from .canvas import draw_rows
from .figure import Drawn, PaperFigure
from .job import Job

WEIGHTS = tuple(i / 8 for i in range(9))
PAIRS = 3
SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)  # of T, from coarse to fine
HALF = 0.5  # of T, the paper's t = 500


def _between(job: Job, a: Tensor, b: Tensor, labels: list[int] | None, t: int, seed: int) -> Tensor:
    """The images between two, with the two at the ends, uint8."""
    device = job.pipeline.unet.device
    first, last = (pixels[None].float().to(device) / 255 for pixels in (a, b))
    nearer = labels and [labels[round(weight)] for weight in WEIGHTS]
    made = interpolate(job.pipeline, first, last, WEIGHTS, t, class_labels=nearer, **job.options(seed))
    images: Tensor = made.images.cpu()  # type: ignore[union-attr]
    return torch.cat([a[None], to_uint8(images * 2 - 1), b[None]])


TOP = ("source", *(f"λ = {w:g}" for w in WEIGHTS), "source")


def _draw_pairs(job: Job, file: Path) -> Drawn:
    pixels, labels = job.pictures(2 * PAIRS)
    (t,) = job.times(HALF)
    rows = [
        _between(job, pixels[i], pixels[i + 1], labels and labels[i : i + 2], t, seed=200 + i)
        for i in range(0, len(pixels) - 1, 2)
    ]
    draw_rows(rows, file, top=TOP)
    ends = torch.stack([(row[1].float() - row[0].float()).square().mean().sqrt() for row in rows])
    return Drawn({"t": t, "T": job.T, "kind": "real images" if job.train else "samples", "rmse": f"{ends.mean():.0f}"})


def _draw_coarse_to_fine(job: Job, file: Path) -> Drawn:
    pixels, labels = job.pictures(2)
    times = list(dict.fromkeys(job.times(*SHARES)))
    rows = [_between(job, pixels[0], pixels[1], labels, t, seed=300) for t in times]
    draw_rows(rows, file, left=[f"t = {t}" for t in times], top=TOP)
    return Drawn({"late": times[0], "early": times[-1]})


FIGURE = PaperFigure(
    name="interpolation",
    title="Interpolation in the latent space",
    place="Fig. 8",
    text="Two {kind}, at the ends of each row, are noised to t = {t} of {T} with the same noise, mixed linearly with"
    " λ, and each mixture is denoised with the same noise again. "
    "A mixture of pixels would show both images, one through the other; here the images between are drawn by "
    "the model, so that they look like its data as far as its samples do. "
    "The reconstructions at λ = 0 and 1 are {rmse} levels of 255 away from the sources, since t keeps only a "
    "part of them.",
    functions=("ddpm_hf.interpolate",),
    draw=_draw_pairs,
    options=("num_inference_steps",),
    calls=lambda job: round(PAIRS * len(WEIGHTS) * HALF * job.steps),
)
COARSE_TO_FINE = PaperFigure(
    name="coarse_to_fine",
    title="Interpolation, from coarse to fine",
    place="Fig. 9",
    text="The same two images, mixed at different times of the diffusion: t = {late} in the first row, t = {early} "
    "in the last. "
    "Late times leave only what is coarse, or nothing, of the sources, so that new images appear between (and "
    "even in place of) them; early times keep detail, so that the mixture is hardly more than one of pixels. "
    "The paper's choice lies in the middle.",
    functions=("ddpm_hf.interpolate",),
    draw=_draw_coarse_to_fine,
    options=("num_inference_steps",),
    calls=lambda job: round(len(WEIGHTS) * sum(SHARES) * job.steps),
)
