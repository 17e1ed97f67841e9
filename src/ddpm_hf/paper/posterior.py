"""The posterior of the forward process, q(x_(t-1) | x_t, x_0): pairs that the chain visits, and Eq. 6-7."""

from __future__ import annotations

from pathlib import Path

import torch

from .canvas import new_figure, style
from .figure import Drawn, PaperFigure
from .job import Job

PAIRS = 4000
X_0 = 0.5


def _draw(job: Job, file: Path) -> Drawn:
    process, T = job.process, job.T
    # Where half of the posterior's mean is x_0's, both arguments of it are seen to matter.
    times = torch.arange(1, T) if T > 1 else torch.tensor([0])
    c_0, c_t, beta_tilde = process.posterior_coefficients(times)
    t = int(times[(c_0 - 0.2).abs().argmin()])
    generator = torch.Generator().manual_seed(job.config.seed)
    start = torch.full((PAIRS, 1), X_0, dtype=torch.float64)
    noise = torch.randn((2, PAIRS, 1), generator=generator, dtype=torch.float64)
    x_s = process.q_sample(start, t - 1, noise[0]) if t > 0 else start
    x_t = process.q_step(x_s, t, noise[1])
    posterior = process.q_posterior(start, x_t, t)
    z = (x_s - posterior.mean) / posterior.variance.sqrt().clamp(min=1e-12)

    figure = new_figure(12, 3.9)
    pairs, residuals, coefficients = figure.subplots(1, 3)
    pairs.plot(x_t, x_s, ".", markersize=1.5, color="tab:blue", alpha=0.5)
    line = torch.linspace(float(x_t.min()), float(x_t.max()), 50, dtype=torch.float64)[:, None]
    mean = process.q_posterior(torch.full_like(line, X_0), line, t)
    pairs.plot(line, mean.mean, color="black", label="μ̃_t(x_t, x_0), Eq. 7")
    for sign in (-2, 2):
        pairs.plot(line, mean.mean + sign * mean.variance.sqrt(), "--", color="black", linewidth=0.8,
                   label="± 2 √β̃_t" if sign == 2 else None)  # fmt: skip
    style(pairs, f"x_t, t = {t}", "x_(t-1)", f"pairs of the chain, x_0 = {X_0}")
    pairs.legend(fontsize=8)

    residuals.hist(z.flatten().numpy(), bins=50, density=True, color="tab:blue", alpha=0.6)
    grid = torch.linspace(-4, 4, 200)
    residuals.plot(grid, torch.exp(-(grid**2) / 2) / (2 * torch.pi) ** 0.5, color="black", label="N(0, 1)")
    style(residuals, "(x_(t-1) - μ̃_t) / √β̃_t", "density", "what is left is standard normal")
    residuals.legend(fontsize=8)

    coefficients.plot(times, c_0, label="weight of x_0")
    coefficients.plot(times, c_t, label="weight of x_t")
    coefficients.plot(times, beta_tilde / process.beta(times), "--", color="0.4", label="β̃_t / β_t")
    coefficients.set_xscale("log")
    style(coefficients, "t", "", "the coefficients of Eq. 7")
    coefficients.legend(fontsize=8)
    figure.savefig(file)
    return Drawn({"t": t, "pairs": f"{PAIRS:,}", "mean": f"{float(z.mean()):.3f}", "std": f"{float(z.std()):.3f}"})


FIGURE = PaperFigure(
    name="posterior",
    title="The posterior of the forward process",
    place="Eq. 6 and 7",
    text="Left, {pairs} pairs (x_t, x_(t-1)) of the forward chain of one pixel at t = {t}: given x_t and x_0, the "
    "step back is Gaussian, with the mean μ̃_t drawn as a line and the variance β̃_t as a band. "
    "In the middle, what remains of x_(t-1) after the mean is taken away and the rest divided by √β̃_t has mean"
    " {mean} and standard deviation {std}, those of a standard normal up to chance. "
    "Right, near the data the mean leans on x_0, and elsewhere it stays at x_t: this is what the network must "
    "imitate without knowing x_0.",
    functions=("ddpm_hf.DDPMProcess.q_posterior", "ddpm_hf.DDPMProcess.posterior_coefficients"),
    draw=_draw,
)
