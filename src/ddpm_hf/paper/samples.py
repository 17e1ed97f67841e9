"""Figures 1 and 3: samples of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..data.pictures import image_grid, to_pil
from .canvas import new_figure
from .figure import Drawn, PaperFigure
from .job import Job

SHOWN = 64


def _draw(job: Job, file: Path) -> Drawn:
    images = job.samples.images[:SHOWN]
    panels = [("Samples of the model", images)]
    if job.train is not None:
        panels.append(("Real images", job.pictures(len(images))[0]))
    figure = new_figure(5.2 * len(panels), 5.5)
    for axes, (title, pixels) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.imshow(np.asarray(image_grid(to_pil(pixels))), interpolation="nearest")
        axes.set_title(title, fontsize=11)
        axes.set_axis_off()
    figure.savefig(file)
    return Drawn({"shown": len(images), "K": job.steps, "seed": job.config.seed})


FIGURE = PaperFigure(
    name="samples",
    title="Samples",
    place="Fig. 1, 3, 11, 13",
    text="These are the first {shown} samples, none of them chosen, each from noise of its own (seed {seed} + its "
    "number) by {K} steps of the reverse process. "
    "Every step asks the network for a prediction, computes x̂_0 from it, and draws from the Gaussian "
    "p_θ(x_(t-1)|x_t) (Algorithm 2). "
    "Beside them stand real images, if any were given, so that both can be judged by the same eye.",
    functions=("ddpm_hf.DDPMPipelineCustom.__call__", "ddpm_hf.DDPMSchedulerCustom.step"),
    draw=_draw,
    options=("num_images", "num_inference_steps", "batch_size"),
    uses_samples=True,
)
