"""Training losses: L_simple and its weightings, the variational bound, and both together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..diffusion.ddpm_process import DDPMProcess, PredictionType, VarianceType, split_model_output

Weighting = Literal["uniform", "snr", "min_snr", "p2"]


def target(process: DDPMProcess, x_0: Tensor, noise: Tensor, t: Tensor, prediction_type: PredictionType) -> Tensor:
    """What the network shall predict: ε, x_0 or v, of the shape of x_0."""
    if prediction_type == "epsilon":
        return noise
    return x_0 if prediction_type == "sample" else process.velocity(x_0, noise, t)


def l_simple(prediction: Tensor, target: Tensor) -> Tensor:
    """L_simple (Eq. 14): the squared error averaged over everything but the batch.

    Returns:
        float32 of shape (B,).
    """
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def loss_weight(
    process: DDPMProcess,
    t: Tensor,
    prediction_type: PredictionType,
    weighting: Weighting,
    *,
    snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor:
    """The weight of the squared error of the prediction at t.

    All but `uniform` weight the same error whatever is predicted, for SNR ‖x_0 - x̂_0‖² = ‖ε - ε̂‖²:
    - uniform: 1 for what is predicted, which is L_simple.
    - snr: ‖ε - ε̂‖².
    - min_snr: min(SNR, γ) ‖x_0 - x̂_0‖² (arXiv 2303.09556, Section 3.4).
    - p2: ‖ε - ε̂‖² / (k + SNR)^γ (arXiv 2204.00227, Eq. 8).

    Returns:
        float32 of the shape of t.
    """
    if weighting == "uniform":
        return torch.ones(t.shape, device=t.device)
    snr = process.snr(t)
    of_noise = {
        "snr": lambda: torch.ones_like(snr),
        "min_snr": lambda: (snr_gamma / snr).clamp(max=1),
        "p2": lambda: (p2_k + snr) ** -p2_gamma,
    }[weighting]()
    # ‖ε - ε̂‖² = SNR ‖x_0 - x̂_0‖² = ᾱ ‖v - v̂‖², and ᾱ = SNR / (SNR + 1)
    of_prediction = {"epsilon": torch.ones_like(snr), "sample": snr, "v_prediction": snr / (snr + 1)}[prediction_type]
    return (of_noise * of_prediction).float().to(t.device)


def vlb(
    process: DDPMProcess,
    model_output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    prediction_type: PredictionType,
    variance_type: VarianceType,
) -> Tensor:
    """An unbiased estimate of Σ_t L_t (Eq. 5, without the constant L_T) for t uniform: T L_{t-1}, or T L_0 at t = 0.

    Args:
        model_output: (B, C, *), or (B, 2C, *) for a learned variance.

    Returns:
        bits/dim of shape (B,), float32.
    """
    p = process.p_mean_variance(model_output, x_t, t, prediction_type=prediction_type, variance_type=variance_type)
    kl, decoder = process.L_t_minus_1(x_0, x_t, t, p), process.L_0(x_0, p)
    return process.num_train_timesteps * torch.where(t == 0, decoder, kl).float()


def detach_mean(model_output: Tensor, x_t: Tensor) -> Tensor:
    """The output of a learned variance, whose first half, which gives the mean, gets no gradient.

    So the bound trains the variance alone, and L_simple the mean (arXiv 2102.09672, Section 3.1).
    """
    prediction, raw_variance = split_model_output(model_output, x_t, "learned_range")
    assert raw_variance is not None
    return torch.cat([prediction.detach(), raw_variance], dim=1)
