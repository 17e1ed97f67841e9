"""Figure 5 and Table 4: rate and distortion of progressive lossy compression."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.likelihood import rate_distortion
from ..evaluation.plots import save_rate_distortion
from .figure import Drawn, PaperFigure
from .job import Job

ROWS = 9


def _draw(job: Job, file: Path) -> Drawn:
    bits = job.bits
    curve = rate_distortion(bits)
    save_rate_distortion(curve, file)
    last = len(curve.timesteps) - 1
    chosen = sorted({round(i * last / (ROWS - 1)) for i in range(ROWS)})
    table = [["reverse steps done", "t", "rate (bits/dim)", "distortion (RMSE of 0 to 255)"]]
    table += [
        [str(i), str(curve.timesteps[i]), f"{float(curve.rate[i]):.4f}", f"{float(curve.distortion[i]):.2f}"]
        for i in chosen
    ]
    rate = float(curve.rate[-1])
    return Drawn(
        {
            "rate": f"{rate:.2f}", "L_0": f"{bits.L_0:.2f}", "total": f"{bits.total:.2f}",
            "rmse": f"{float(curve.distortion[-1]):.1f}", "count": bits.num_images,
            "halfway": f"{float(curve.rate[last // 2]) / max(rate, 1e-12):.0%}",
        },
        table,
    )  # fmt: skip


FIGURE = PaperFigure(
    name="rate_distortion",
    title="Rate and distortion",
    place="Fig. 5, Table 4",
    text="Read as a code, the reverse process sends an image step by step: after each step the receiver knows x_t, "
    "guesses x̂_0 from it (Eq. 15), and the guess gets better as bits arrive (the terms of Eq. 5). "
    "Over {count} images a lossless code takes {total} bits/dim: {rate} of rate and {L_0} for the last step, "
    "which describes what is left, an error of {rmse} levels of 255. "
    "Half of the steps cost {halfway} of the rate, since the first ones fix the coarse and cheap, and the last "
    "ones what no eye sees.",
    functions=("ddpm_hf.bits_per_dim", "ddpm_hf.rate_distortion"),
    draw=_draw,
    options=("num_likelihood_images", "batch_size"),
    needs_images=True,
    calls=lambda job: job.num_likelihood_images * job.T,
)
