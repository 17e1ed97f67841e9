"""Training losses of arXiv 2006.11239 and their weightings."""

from __future__ import annotations

import torch
from torch import Tensor

from .ddpm_process import DDPMProcess, PredictionType


def target(process: DDPMProcess, x_0: Tensor, noise: Tensor, t: Tensor, prediction_type: PredictionType) -> Tensor:
    """What the network shall predict: ε, x_0 or v, of the shape of x_0."""
    if prediction_type == "epsilon":
        return noise
    return x_0 if prediction_type == "sample" else process.velocity(x_0, noise, t)


def min_snr_weight(process: DDPMProcess, t: Tensor, prediction_type: PredictionType, gamma: float) -> Tensor:
    """min(SNR, γ) weighting of the error of x̂_0, as a weight of the squared error of the prediction.

    arXiv 2303.09556, Eq. 8 and Section 3.4: min(SNR, γ) for `sample`, over SNR for `epsilon`, over SNR + 1 for
    `v_prediction`.

    Returns:
        float32 of the shape of t.
    """
    snr = process.snr(t)
    clamped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        clamped = torch.where(snr > 0, clamped / snr, 1.0)
    elif prediction_type == "v_prediction":
        clamped = clamped / (snr + 1)
    return clamped.float()


def l_simple(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """L_simple (Eq. 14): the squared error averaged over everything but the batch, weighted per image.

    Returns:
        float32 of shape (B,).
    """
    per_image = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return per_image if weight is None else weight * per_image
