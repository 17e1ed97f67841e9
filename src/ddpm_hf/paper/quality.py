"""Figure 10: the quality of x̂_0 over reverse time."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.metrics.distances import frechet_distance, moments
from .canvas import new_figure, style
from .figure import Drawn, PaperFigure
from .job import Job


def _draw(job: Job, file: Path) -> Drawn:
    samples = job.samples
    distances = [frechet_distance(moments(job.features(x_0)), job.real_moments) for x_0 in samples.x_0]
    error = (samples.x_0.float() - samples.images.float()).square().mean(dim=(1, 2, 3, 4)).sqrt()
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot(samples.timesteps, distances, marker=".")
    right.plot(samples.timesteps, error, marker=".", color="tab:orange")
    style(left, "t", "Fréchet distance", "x̂_0 to real images")
    style(right, "t", "RMSE, 0 to 255", "x̂_0 to the finished sample")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.set_ylim(bottom=0)
    figure.savefig(file)
    return Drawn({
        "count": samples.x_0.shape[1], "features": job.feature_name, "first": f"{distances[0]:.3g}",
        "last": f"{distances[-1]:.3g}", "t": samples.timesteps[0],
    })  # fmt: skip


FIGURE = PaperFigure(
    name="quality",
    title="The quality of x̂_0 over reverse time",
    place="Fig. 10",
    text="Left, the Fréchet distance between the guesses x̂_0 of {count} samples and the real images, in {features}:"
    " from {first} at t = {t} to {last} at the end. "
    "Right, how far the guesses still are from the finished samples. "
    "The paper plots FID and Inception Score, which need Inception and thousands of samples "
    "(--feature_extractor inception --num_images 10000); compare values of one run with each other only.",
    functions=("ddpm_hf.DDPMProcess.predict_x0", "ddpm_hf.evaluation.metrics.distances.frechet_distance"),
    draw=_draw,
    options=("num_images", "num_inference_steps", "batch_size", "feature_extractor"),
    needs_images=True,
    uses_samples=True,
)
