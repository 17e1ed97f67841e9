"""Measure what few steps depend on: the error of a network's x̂_0 at every timestep.

It determines the optimal reverse variance and the best timesteps (Bao et al. 2022, arXiv 2201.06503), which
`ddpm_few_steps.py` computes from it. Nothing is trained: N images cost N · T network calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..diffusion.ddpm_few_steps import Calibration, fingerprint
from ..diffusion.ddpm_process import check_choice
from ..diffusion.ddpm_repository import complete_repository
from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..distributed import sum_over_processes
from ..storage.files import full_disk_explained, write_text_atomically
from ..storage.weights import size_of
from .predictions import NoisyImages, Prediction, on_cpu

MIN_IMAGES = 16  # below it the standard error itself is a guess


def calibrate(
    pipe: DDPMPipelineCustom,
    images: Tensor,
    *,
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    class_labels: int | Sequence[int] | Tensor | None = None,
    show_progress: bool = True,
) -> Calibration:
    """Measure the network's errors on images, and store them in the scheduler's configuration.

    Under `accelerate launch` or torchrun the images are distributed by index, and every process gets the same
    calibration. The channels of a learned variance are ignored.

    Args:
        pipe: the pipeline, with a `DDPMSchedulerCustom`.
        images: uint8 of shape (N, C, H, W), of the distribution that the network was trained on.
        num_images: how many of them to use, drawn by `seed`; by default all.
        seed: fixes the choice of images, and their noise.
        batch_size: images per network call and process. It affects only speed and memory.
        class_labels: for a class-conditional network: one label for all images, or N of them.
        show_progress: a progress bar on the main process.

    Returns:
        The calibration, which is also stored in `pipe.scheduler`.

    Raises:
        ValueError: before anything is computed: for images that the network can't take, for fewer than 16 of them, and
            for a scheduler of another kind. Afterwards: for predictions that are not finite.
    """
    noisy = NoisyImages(pipe, images, num_images, seed, batch_size, class_labels, min_images=MIN_IMAGES)
    scheduler = pipe.scheduler
    T, n = len(scheduler), len(noisy.indices)
    # Σ and Σ² over the images of ‖x_0 - x̂_0‖²/d and ‖ε̂‖²/d, for every t
    sums = torch.zeros(2, 2, T, dtype=torch.float64)
    predictions = noisy.predictions(torch.arange(T), same_noise=True, title="Calibrating", show_progress=show_progress)
    for t, squares in on_cpu((p.column, _mean_squares(scheduler, p)) for p in predictions):
        sums[0, :, t] += squares.sum(1)
        sums[1, :, t] += squares.square().sum(1)

    sums = sum_over_processes(sums)
    mean = sums[0] / n
    if not mean.isfinite().all():
        t = int((~mean.isfinite()).any(0).nonzero()[0])
        raise ValueError(f"the network's prediction at t = {t} holds NaN or infinity: it is damaged, or needs float32.")
    standard_error = ((sums[1] / n - mean.square()).clamp(min=0) / (n - 1)).sqrt()
    measured_with = fingerprint(scheduler.process, scheduler.config)
    calibration = Calibration(mean[0], standard_error[0], mean[1], standard_error[1], n, measured_with)
    scheduler.set_calibration(calibration)
    return calibration


def _mean_squares(scheduler: DDPMSchedulerCustom, p: Prediction) -> Tensor:
    """‖x_0 - x̂_0‖²/d and ‖ε̂‖²/d of each image, (2, B)."""
    output = p.output[:, : p.x_t.shape[1]]
    pred_x_0 = scheduler.predict_x_0(output, p.x_t, p.t)
    pred_eps = scheduler.process.predict_eps(output, p.x_t, p.t, scheduler.config.prediction_type)
    return torch.stack([p.x_0 - pred_x_0, pred_eps]).square().flatten(2).mean(2)


def expected_rate(scheduler: DDPMSchedulerCustom, timesteps: Sequence[int], variance_type: str = "optimal") -> float:
    """The terms Σ L_{t-1} of the variational bound along a trajectory, without L_T and L_0, in bits/dim.

    From the calibration alone: with errors of x̂_0 of mean square e_t, the expected KL of a step is
    ½ (ln(σ²/β̃) + (β̃ + c_0² e_t)/σ² - 1) nats/dim, for any σ² that is not predicted by the network.

    Args:
        timesteps: strictly descending.
        variance_type: `fixed_small`, `fixed_large` or `optimal`.
    """
    check_choice("variance_type", variance_type, ("fixed_small", "fixed_large", "optimal"))
    if len(timesteps) < 2:
        return 0.0
    t, s = torch.tensor(timesteps[:-1]), torch.tensor(timesteps[1:])
    process, x_0_error = scheduler.process, scheduler.calibration.x_0_error[t]
    beta_tilde = process.posterior_coefficients(t, s)[2]
    needed = process.optimal_variance(x_0_error, t, s)
    variance = {"fixed_small": beta_tilde, "fixed_large": process.beta(t, s), "optimal": needed}[variance_type]
    nats = 0.5 * ((variance / beta_tilde).log() + needed / variance - 1)
    return float(nats.sum()) / math.log(2)


def recommended_steps(scheduler: DDPMSchedulerCustom) -> int:
    """The fewest steps that model the data as well, in bits/dim, as the whole chain of T steps with σ² = β̃.

    With the optimal variance and the best timesteps, from the calibration alone.
    """
    T = len(scheduler)
    enough = expected_rate(scheduler, range(T - 1, -1, -1), "fixed_small")
    low, high = 1, T
    while low < high:  # the rate falls with every additional step
        K = (low + high) // 2
        if K > 1 and expected_rate(scheduler, scheduler.optimal_timesteps(K)) <= enough:
            high = K
        else:
            low = K + 1
    return low


def steps_table(scheduler: DDPMSchedulerCustom, steps: Sequence[int] = (10, 25, 50, 100)) -> str:
    """The `expected_rate` of K even timesteps by variance, and of the best ones, as a Markdown table for a card."""
    T = len(scheduler)
    rows = ["| bits/dim of K steps | β̃ | β | optimal | optimal, best timesteps |", "|---|---|---|---|---|"]
    for K in [*(K for K in steps if K < T), T]:
        even = np.linspace(T - 1, 0, K).round().astype(int).tolist()
        rates = [expected_rate(scheduler, even, v) for v in ("fixed_small", "fixed_large", "optimal")]
        rates.append(expected_rate(scheduler, scheduler.optimal_timesteps(K)))
        rows.append(f"| {K} | " + " | ".join(f"{rate:.3f}" for rate in rates) + " |")
    return "\n".join(rows)


def save_calibrated(pipe: DDPMPipelineCustom, place: Path) -> None:
    """Save a calibrated pipeline. In its own folder only the scheduler and the code are replaced, not the weights."""
    if not (place / "model_index.json").is_file():
        with full_disk_explained(place, size_of(pipe.unet.parameters())):
            pipe.save_pretrained(place)
        return
    with full_disk_explained(place):
        complete_repository(place, has_custom_scheduler=True)
    name = pipe.scheduler.config_name
    write_text_atomically(place / "scheduler" / name, pipe.scheduler.to_json_string())
