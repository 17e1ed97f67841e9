"""Algorithms 1 and 2 as a flow of pictures: what goes into the network, what comes out, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.pixels import normalize, to_uint8
from ..sampling.generate import eval_mode
from .canvas import as_rgb, new_figure
from .figure import Drawn, PaperFigure
from .job import Job

NOISE_RANGE = 3.0  # noise is shown from -3 to 3


def _draw(job: Job, file: Path) -> Drawn:
    process, scheduler, unet = job.process, job.pipeline.scheduler, job.pipeline.unet
    pixels, labels = job.pictures(1)
    t, s = max(job.T // 2, 1), max(job.T // 2 - max(job.T // 10, 1), 0)
    generator = torch.Generator().manual_seed(job.config.seed)
    x_0 = normalize(pixels)
    noise, z = (torch.randn(x_0.shape, generator=generator) for _ in range(2))
    x_t = process.q_sample(x_0, t, noise)
    given: dict[str, Any] = {} if labels is None else {"class_labels": torch.tensor(labels, device=unet.device)}
    with eval_mode(unet):
        output = unet(x_t.to(unet.device), t, **given).sample.float().cpu()[:, : x_0.shape[1]]
    eps = process.predict_eps(output, x_t, t, scheduler.config.prediction_type)
    reverse = process.p_mean_variance(
        output, x_t, t, s, prediction_type=scheduler.config.prediction_type, clip=scheduler.limit_x_0
    )
    x_s = reverse.mean + reverse.variance.sqrt() * z

    training = [
        ("image x_0", x_0, "and"), ("noise ε", noise / NOISE_RANGE, f"Eq. 4, t = {t}"), ("x_t", x_t, "network"),
        ("guess ε̂", eps / NOISE_RANGE, "L_simple"), ("ε - ε̂", (noise - eps) / NOISE_RANGE, ""),
    ]  # fmt: skip
    sampling = [
        (f"x_t, t = {t}", x_t, "network"), ("guess ε̂", eps / NOISE_RANGE, "Eq. 15"),
        ("guess x̂_0", reverse.pred_x_0, "Eq. 7"),
        ("mean μ_θ", reverse.mean, "+ σ z"), (f"x_s, s = {s}", x_s, ""),
    ]  # fmt: skip
    figure = new_figure(10.5, 3.2)
    rows = figure.subplots(2, 5)
    for axes, name, tiles in zip(
        rows, ("Training\n(Algorithm 1)", "Sampling\n(Algorithm 2)"), (training, sampling), strict=True
    ):
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=14)
        for axis, (title, image, arrow) in zip(axes, tiles, strict=True):
            _tile(axis, title, image, arrow)
    figure.get_layout_engine().set(wspace=0.15, hspace=0.06)
    figure.savefig(file)
    error = float((reverse.pred_x_0 - x_0).square().mean().sqrt() * 127.5)
    return Drawn({"t": t, "s": s, "loss": f"{float((noise - eps).square().mean()):.3f}", "error": f"{error:.0f}"})


def _tile(axis: Any, title: str, image: Tensor, arrow: str) -> None:
    axis.imshow(as_rgb(to_uint8(image))[0], interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xticks([])
    axis.set_yticks([])
    if not arrow:
        return
    if arrow != "and":
        where = {"xycoords": "axes fraction", "textcoords": "axes fraction", "annotation_clip": False}
        axis.annotate("", xy=(1.85, 0.5), xytext=(1.1, 0.5), arrowprops={"arrowstyle": "->"}, **where)
    axis.text(1.47, 0.56, arrow, transform=axis.transAxes, ha="center", va="bottom", fontsize=8)


FIGURE = PaperFigure(
    name="flow",
    title="Training and sampling, in pictures",
    place="Algorithms 1 and 2",
    text="Training takes an image, noise and a time (here t = {t}), mixes them by Eq. 4, and asks the network for "
    "the noise; the mean square of the difference, {loss} for this image, is the loss. "
    "Sampling asks the same question, turns the answer into a guess x̂_0 of the image (here {error} levels of "
    "255 from the image), and draws x_s from the Gaussian that the posterior gives for this guess. "
    "One step of the chain would hardly be seen, so this one goes to s = {s} at once; noises are shown from -3 "
    "to 3.",
    functions=("ddpm_hf.training.losses.training_losses", "ddpm_hf.DDPMProcess.p_mean_variance"),
    draw=_draw,
    calls=lambda job: 1,
)
