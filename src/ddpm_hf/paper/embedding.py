"""The sinusoidal time embedding: as a heat map, and how similar two times look to the network."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from .canvas import new_figure, style
from .figure import Drawn, PaperFigure
from .job import Job


def _draw(job: Job, file: Path) -> Drawn:
    unet, T = job.pipeline.unet, job.T
    t = torch.arange(T, device=unet.device)
    with torch.no_grad():
        embedding = unet.time_proj(t).float().cpu()
    dimension = embedding.shape[1]
    similarity = embedding @ embedding.T / (dimension / 2)
    figure = new_figure(12, 4)
    heat, products, curves = figure.subplots(1, 3)
    shown = heat.imshow(embedding.T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    figure.colorbar(shown, ax=heat)
    style(heat, "t", "component", f"time_proj(t), {dimension} components")
    heat.grid(visible=False)
    shown = products.imshow(similarity, cmap="viridis", origin="lower", interpolation="nearest")
    figure.colorbar(shown, ax=products)
    style(products, "t", "t'", "dot product, 1 for equal times")
    products.grid(visible=False)
    for time in dict.fromkeys(job.times(0.1, 0.5, 0.9)):
        curves.plot(torch.arange(T), similarity[time], label=f"t' = {time}", linewidth=0.7)
    style(curves, "t", "dot product", "with three times")
    curves.legend(fontsize=8)
    figure.savefig(file)
    half, shift = dimension // 2, unet.time_proj.downscale_freq_shift
    longest = 2 * math.pi * 10_000 ** ((half - 1) / max(half - shift, 1))
    near = f"{float(similarity.diagonal(min(10, T - 1)).mean()):.2f}"
    return Drawn({"dimension": dimension, "near": near, "longest": f"{longest:,.0f}"})


FIGURE = PaperFigure(
    name="embedding",
    title="The sinusoidal embedding of time",
    place="Appendix B",
    text="The network is told t as {dimension} sines and cosines, whose wavelengths grow geometrically from 2π to "
    "{longest}; they are read here off the network's own layer `time_proj`. "
    "The dot product of two times depends on their distance alone and is largest where they are equal (ten "
    "steps apart it is {near}), so that the network can tell times apart and still treat near ones alike. "
    "Two linear layers make of it what each residual block adds to its channels.",
    functions=("diffusers.models.embeddings.Timesteps",),
    draw=_draw,
)
