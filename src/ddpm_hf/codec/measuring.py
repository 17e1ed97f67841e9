"""A calibration for one file, of a model that has none: from the very images that are to be compressed.

A file stores the errors of its own timesteps, so nothing stops an encoder from measuring them: some network calls per
image for a few images, and steps that are as good as those of a calibrated model.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..diffusion.ddpm_few_steps import Calibration, fingerprint
from ..diffusion.pipeline import DDPMPipelineCustom
from ..evaluation.predictions import NoisyImages, Prediction, on_cpu

MAX_IMAGES = 32
SMALLEST = 1e-12  # an error, whose logarithm is finite
POINTS = 24  # timesteps from 0 to T - 1, in equal ratios, and as many at equal distances


def with_calibration(
    pipeline: DDPMPipelineCustom, pixels: NDArray[np.uint8], class_label: int | None, show_progress: bool = False
) -> DDPMPipelineCustom:
    """The pipeline, or, if it has no calibration, another one with the same network and one measured on the images.

    Errors of x̂_0 are measured at some timesteps, and interpolated between them: they change smoothly.

    Args:
        pixels: uint8 (N, C, H, W), of which at most 32 are used.
        class_label: of all images, for a class-conditional network.

    Raises:
        ValueError: for a scheduler that is no `DDPMSchedulerCustom`, and images that the network can't take.
    """
    count = min(len(pixels), MAX_IMAGES)
    images = torch.from_numpy(np.ascontiguousarray(pixels[:: len(pixels) // count][:count]))
    noisy = NoisyImages(pipeline, images, batch_size=count, class_labels=class_label, min_images=1)
    if pipeline.scheduler.config.get("_calibration") is not None:
        return pipeline
    scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config)
    T = len(scheduler)
    points = np.unique(np.concatenate([np.geomspace(1, T, POINTS) - 1, np.linspace(0, T - 1, POINTS)]).round())
    timesteps = torch.from_numpy(points.astype(np.int64))
    errors = np.zeros(len(points))
    predictions = noisy.predictions(timesteps, same_noise=True, title="Measuring", show_progress=show_progress)
    for i, squares in on_cpu((p.column, _mean_squares(pipeline, p)) for p in predictions):
        errors[i] += float(squares.sum()) / count
    logs = np.interp(np.log1p(np.arange(T)), np.log1p(points), np.log(errors + SMALLEST))
    x_0_error, none = torch.from_numpy(np.exp(logs)), torch.zeros(T, dtype=torch.float64)
    measured_with = fingerprint(scheduler.process, scheduler.config)
    scheduler.set_calibration(Calibration(x_0_error, none, none, none, count, measured_with))
    return DDPMPipelineCustom(pipeline.unet, scheduler)


def _mean_squares(pipeline: DDPMPipelineCustom, p: Prediction) -> Tensor:
    """‖x_0 - x̂_0‖²/d, (B,)."""
    pred_x_0 = pipeline.scheduler.predict_x_0(p.output[:, : p.x_t.shape[1]], p.x_t, p.t)
    return (p.x_0 - pred_x_0).square().flatten(1).mean(1)
