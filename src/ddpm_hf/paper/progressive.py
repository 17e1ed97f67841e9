"""Figures 6 and 14: what the model expects the image to be, while it is being made; and the noisy image itself."""

from __future__ import annotations

from pathlib import Path

from .canvas import draw_rows
from .figure import Drawn, PaperFigure
from .job import Job

SHOWN = 6
OPTIONS = ("num_images", "num_inference_steps", "batch_size")


def _draw(job: Job, file: Path) -> Drawn:
    samples = job.samples
    count = min(SHOWN, samples.x_0.shape[1])
    draw_rows([samples.x_0[:, i] for i in range(count)], file, top=[f"t = {t}" for t in samples.timesteps])
    change = (samples.x_0.float() - samples.images.float()).square().mean(dim=(1, 2, 3, 4)).sqrt()
    halfway = len(change) // 2
    return Drawn({"first": samples.timesteps[0], "half": samples.timesteps[halfway], "rmse": f"{change[halfway]:.0f}"})


FIGURE = PaperFigure(
    name="progressive",
    title="Progressive generation",
    place="Fig. 6, 14",
    text="Each row is one sample, and each column the network's guess x̂_0 of the finished image from x_t (Eq. 15), "
    "from t = {first} at the left to 0 at the right. "
    "What is large is decided first and detail last: early guesses are blurred, since they average over all "
    "images that x_t still allows. "
    "At t = {half} the guess is on average {rmse} levels of 255 from what the sample will be.",
    functions=("ddpm_hf.DDPMProcess.predict_x0", "ddpm_hf.DDPMPipelineCustom.__call__ (trajectory_every)"),
    draw=_draw,
    options=OPTIONS,
    uses_samples=True,
)


def _draw_strip(job: Job, file: Path) -> Drawn:
    samples = job.samples
    rows = [part[:, i] for i in range(min(3, samples.x_t.shape[1])) for part in (samples.x_t, samples.x_0)]
    draw_rows(rows, file, left=["x_t", "x̂_0"] * (len(rows) // 2), top=[f"t = {t}" for t in samples.timesteps])
    noise = samples.x_t[0].float() - samples.images.float()
    return Drawn({"K": job.steps, "rmse": f"{float(noise.square().mean().sqrt()):.0f}", "images": len(rows) // 2})


STRIP = PaperFigure(
    name="sampling_strip",
    title="Sampling, step by step",
    place="Algorithm 2",
    text="{images} samples on their way from noise: the upper strip of each pair is x_t after the step from t, the "
    "lower one the guess x̂_0 that the step was made with. "
    "Every one of the {K} steps moves x_t a little towards x̂_0 and adds fresh noise, less each time, and none "
    "in the last step. "
    "After the first column x_t is {rmse} levels of 255 from the finished image, and still looks like noise "
    "alone when x̂_0 shows a shape already.",
    functions=("ddpm_hf.DDPMSchedulerCustom.step", "ddpm_hf.DDPMProcess.p_mean_variance"),
    draw=_draw_strip,
    options=OPTIONS,
    uses_samples=True,
)
