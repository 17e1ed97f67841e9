"""Figure 7: images that share one x_t."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data.pixels import normalize, to_uint8
from ..diffusion.pipeline import DDPMPipelineCustomOutput
from ..restoration.edit import variations
from .canvas import draw_rows
from .figure import Drawn, PaperFigure
from .job import Job

SHARES = (1.0, 0.75, 0.5, 0.25)  # of T, as in the paper
COPIES = 8


def _draw(job: Job, file: Path) -> Drawn:
    pixels, labels = job.pictures(1)
    image = (pixels.float() / 255).to(job.pipeline.unet.device)
    rows, spread = [], []
    times = list(dict.fromkeys(job.times(*SHARES)))
    for number, t in enumerate(times):
        options = job.options(seed=100 * (number + 1), count=COPIES)
        made: DDPMPipelineCustomOutput = variations(
            job.pipeline, image, t, COPIES, class_labels=labels and labels * COPIES, **options
        )
        images: torch.Tensor = made.images.cpu()  # type: ignore[union-attr]
        first = torch.Generator().manual_seed(job.config.seed + 100 * (number + 1))
        x_t = job.process.q_sample(normalize(pixels), t, torch.randn(pixels.shape, generator=first))
        rows.append(torch.cat([pixels, to_uint8(x_t), to_uint8(images * 2 - 1)]))
        spread.append(float((images.std(0) * 255).square().mean().sqrt()))
    top = ["image", "x_t", *(f"draw {i + 1}" for i in range(COPIES))]
    draw_rows(rows, file, left=[f"t = {t}" for t in times], top=top)
    return Drawn({
        "source": "a real image" if job.train else "a sample", "copies": COPIES, "late": times[0], "early": times[-1],
        "wide": f"{spread[0]:.0f}", "narrow": f"{spread[-1]:.0f}",
    })  # fmt: skip


FIGURE = PaperFigure(
    name="shared",
    title="Images that share a noisy one",
    place="Fig. 7",
    text="In each row {source} is noised to t, and {copies} reverse chains start from the same x_t, each with noise "
    "of its own: draws from p_θ(x_0|x_t). "
    "From t = {late} they share next to nothing, and differ by {wide} levels of 255 from each other; from t = "
    "{early} they differ by {narrow}, in details. "
    "So x_t holds first what is large and later what is small, although no one asked for that order.",
    functions=("ddpm_hf.variations",),
    draw=_draw,
    options=("num_inference_steps",),
    calls=lambda job: round(COPIES * sum(SHARES) * job.steps),
)
