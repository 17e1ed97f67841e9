"""The noise schedule: β_t, what is left of signal and noise, and their ratio."""

from __future__ import annotations

from pathlib import Path

import torch

from .canvas import new_figure, style
from .figure import Drawn, PaperFigure
from .job import Job


def _draw(job: Job, file: Path) -> Drawn:
    process, t = job.process, torch.arange(job.T)
    figure = new_figure(12, 3.6)
    betas, parts, ratio = figure.subplots(1, 3)
    betas.plot(t, process.betas, color="tab:blue", label="β_t")
    if job.T > 1:
        _, _, beta_tilde = process.posterior_coefficients(t[1:])
        betas.plot(t[1:], beta_tilde, "--", color="tab:orange", label="β̃_t")
    betas.set_yscale("log")
    style(betas, "t", "", "variance that a step adds")
    parts.plot(t, process.alpha_bar(t).sqrt(), label="√ᾱ_t, of the image")
    parts.plot(t, process.one_minus_alpha_bar(t).sqrt(), label="√(1 - ᾱ_t), of the noise")
    style(parts, "t", "", "what x_t is made of")
    ratio.plot(t, process.log_snr(t), color="tab:green", label="log SNR")
    ratio.axhline(0, color="0.6", linewidth=0.8)
    style(ratio, "t", "nats", "log(ᾱ_t / (1 - ᾱ_t))")
    for axes in (betas, parts, ratio):
        axes.legend(fontsize=8)
    figure.savefig(file)
    snr = process.log_snr(t)
    even = int((snr >= 0).sum())
    return Drawn({
        "schedule": job.pipeline.scheduler.config.beta_schedule, "T": job.T, "even": even,
        "last": f"{float(process.alpha_bar(job.T - 1)):.2e}",
    })  # fmt: skip


FIGURE = PaperFigure(
    name="schedule",
    title="The noise schedule and the signal-to-noise ratio",
    place="Section 4",
    text="The schedule `{schedule}` with T = {T} sets the variance β_t of each forward step; β̃_t is the smaller one"
    " of the step back (Eq. 7). "
    "In x_t the image keeps the factor √ᾱ_t and the noise has √(1 - ᾱ_t); both are equally strong at about t = "
    "{even}. "
    "What is left of an image in x_T, ᾱ_T = {last} of its variance, must be next to nothing, since sampling starts "
    "from pure noise.",
    functions=("ddpm_hf.diffusion.ddpm_process.make_betas", "ddpm_hf.DDPMProcess.log_snr"),
    draw=_draw,
)
