"""Measure what few steps need to know about a network: the error of its x̂_0 at every timestep.

The numbers give the optimal reverse variance and the best timesteps (Bao et al. 2022, arXiv 2201.06503); what follows
from them is in `ddpm_few_steps.py`. Nothing is trained: N images cost N · T network calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ddpm_few_steps import Calibration, fingerprint
from .ddpm_process import LEARNED_VARIANCE_TYPES
from .pipeline import DDPMPipelineCustom
from .probing import Probe, sum_over_processes

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
    """Measure the network's errors on images, and keep them in the scheduler's configuration.

    Under `accelerate launch` or torchrun the images are shared out by index, and every process ends with the same
    calibration. A network that learned its variance is calibrated too: its variance channels play no part.

    Args:
        pipe: the pipeline, with a `DDPMSchedulerCustom`.
        images: uint8 of shape (N, C, H, W), of the distribution that the network was trained on.
        num_images: how many of them to use, drawn by `seed`; by default all.
        seed: fixes the choice of images, and their noise.
        batch_size: images per network call and process. It changes nothing but speed and memory.
        class_labels: for a class-conditional network: one label for all images, or N of them.
        show_progress: a progress bar on the main process.

    Returns:
        The calibration, which is now that of `pipe.scheduler` too.

    Raises:
        ValueError: before anything is computed: for images that the network can't take, for fewer than 16 of them, and
            for a scheduler of another kind.
    """
    probe = Probe(pipe, images, num_images, seed, batch_size, class_labels, min_images=MIN_IMAGES)
    scheduler = pipe.scheduler
    T, n = len(scheduler), len(probe.indices)
    # Σ and Σ² over the images of ‖x_0 - x̂_0‖²/d and ‖ε̂‖²/d, for every t
    sums = torch.zeros(2, 2, T, dtype=torch.float64)
    for p in probe.predictions(torch.arange(T), "Calibrating", show_progress):
        output = p.output[:, : p.x_t.shape[1]]
        pred_x_0 = scheduler.predict_x_0(output, p.x_t, p.t)
        pred_eps = scheduler.process.predict_eps(output, p.x_t, p.t, scheduler.config.prediction_type)
        squares = torch.stack([p.x_0 - pred_x_0, pred_eps]).square().flatten(2).mean(2).double().cpu()
        sums[0, :, p.column] += squares.sum(1)
        sums[1, :, p.column] += squares.square().sum(1)

    sums = sum_over_processes(sums)
    mean = sums[0] / n
    standard_error = ((sums[1] / n - mean.square()).clamp(min=0) / (n - 1)).sqrt()
    print_mark = fingerprint(scheduler.process, scheduler.config)
    calibration = Calibration(mean[0], standard_error[0], mean[1], standard_error[1], n, print_mark)
    scheduler.set_calibration(calibration)
    return calibration
