"""The forward process: a chain of small steps beside the closed form, image by image and in law."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.pixels import normalize, to_uint8
from ..diffusion.ddpm_process import DDPMProcess
from .canvas import as_rgb, new_figure, style
from .figure import Drawn, PaperFigure
from .job import Job

DRAWS = 20_000
COLUMNS = 10


class BothWays(NamedTuple):
    """Mean and variance of x_t, estimated from draws of the chain and of the closed form, (S,) each, float64."""

    timesteps: list[int]
    chain_mean: Tensor
    chain_variance: Tensor
    closed_mean: Tensor
    closed_variance: Tensor


def both_ways(process: DDPMProcess, x_0: float, timesteps: list[int], draws: int, seed: int) -> BothWays:
    """Draw x_t of one pixel `draws` times, by Eq. 2 step after step, and by Eq. 4 at once.

    Args:
        x_0: the pixel, in [-1, 1].
        timesteps: where to look, ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.full((draws, 1), x_0, dtype=torch.float64)
    found = []
    x = start
    for t in range(timesteps[-1] + 1):
        x = process.q_step(x, t, torch.randn(x.shape, generator=generator, dtype=x.dtype))
        if t in timesteps:
            closed = process.q_sample(start, t, torch.randn(x.shape, generator=generator, dtype=x.dtype))
            found.append(torch.stack([x.mean(), x.var(), closed.mean(), closed.var()]))
    return BothWays(timesteps, *torch.stack(found).unbind(1))


def largest_deviation(process: DDPMProcess, x_0: float, found: BothWays, draws: int) -> float:
    """The largest difference of an estimate from Eq. 4, in standard errors of the estimate."""
    t = torch.tensor(found.timesteps)
    mean, variance = process.alpha_bar(t).sqrt() * x_0, process.one_minus_alpha_bar(t)
    mean_error, variance_error = (variance / draws).sqrt(), variance * (2 / (draws - 1)) ** 0.5
    z = [
        (estimate - exact).abs() / error
        for estimate, exact, error in (
            (found.chain_mean, mean, mean_error),
            (found.closed_mean, mean, mean_error),
            (found.chain_variance, variance, variance_error),
            (found.closed_variance, variance, variance_error),
        )
    ]
    return float(torch.stack(z).max())


def _draw(job: Job, file: Path) -> Drawn:
    process, T = job.process, job.T
    pixels, _ = job.pictures(1)
    x_0 = normalize(pixels).double()
    times = sorted(set(job.times(*(i / COLUMNS for i in range(1, COLUMNS + 1)))))
    generator = torch.Generator().manual_seed(job.config.seed)
    chain, closed, x = [pixels], [pixels], x_0
    for t in range(T):
        x = process.q_step(x, t, torch.randn(x.shape, generator=generator, dtype=x.dtype))
        if t in times:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            chain.append(to_uint8(x))
            closed.append(to_uint8(process.q_sample(x_0, t, noise)))

    value = 0.8
    found = both_ways(process, value, times, DRAWS, job.config.seed)
    figure = new_figure(11, 5.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.35])
    strips, plots = upper.subplots(2, len(chain)), lower.subplots(1, 2)
    for row, (name, images) in enumerate((("chain, Eq. 2", chain), ("closed form, Eq. 4", closed))):
        for column, image in enumerate(images):
            axes = strips[row, column]
            axes.imshow(as_rgb(image[0]), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title("x_0" if column == 0 else f"t = {times[column - 1]}", fontsize=9)
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    every = torch.arange(T)
    panels = (
        (plots[0], process.alpha_bar(every).sqrt() * value, found.chain_mean, found.closed_mean, "mean of x_t"),
        (
            plots[1],
            process.one_minus_alpha_bar(every),
            found.chain_variance,
            found.closed_variance,
            "variance of x_t",
        ),
    )
    for axes, exact, of_chain, of_closed, title in panels:
        axes.plot(every, exact, color="0.6", label="Eq. 4")
        axes.plot(times, of_chain, "o", color="tab:blue", label="chain")
        axes.plot(times, of_closed, "x", color="tab:orange", label="closed form")
        style(axes, "t", "", f"{title} of a pixel with x_0 = {value}, {DRAWS:,} draws")
        axes.legend(fontsize=8)
    figure.savefig(file)
    return Drawn({"draws": f"{DRAWS:,}", "worst": round(largest_deviation(process, value, found, DRAWS), 1)})


FIGURE = PaperFigure(
    name="forward",
    title="The forward process: a chain and its closed form",
    place="Eq. 2 and 4",
    text="The upper strip adds a little noise at every step (Eq. 2), the lower one jumps to each t at once (Eq. 4), "
    "with noise of its own. "
    "The pictures differ, their distribution does not: below, mean and variance of one pixel over {draws} draws"
    " of either kind lie on the curves √ᾱ_t x_0 and 1 - ᾱ_t. "
    "The largest of all deviations is {worst} standard errors, as chance has it.",
    functions=("ddpm_hf.DDPMProcess.q_step", "ddpm_hf.DDPMProcess.q_sample"),
    draw=_draw,
)
