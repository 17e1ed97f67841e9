"""Algorithm 1 of arXiv 2006.11239, `training_losses`, and its parts: L_simple, its weightings, and the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..config.training import TrainConfig
from ..diffusion.ddpm_process import DDPMProcess, PredictionType, VarianceType

Weighting = Literal["uniform", "snr", "min_snr", "min_snr_v", "p2"]


def training_losses(
    unet: Callable[..., Any], process: DDPMProcess, x_0: Tensor, labels: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: draw t and ε, noise the images, and compare the network's prediction with its target.

    Args:
        unet: maps (x_t, t) to an output with a `sample`: (B, C, H, W), or (B, 2C, H, W) for a learned variance.
        x_0: images in [-1, 1], (B, C, H, W).
        labels: int64 (B,), for a class-conditional network.

    Returns:
        The loss of each image, float32 of shape (B,), and its t, int64 of shape (B,).
    """
    t = torch.randint(process.num_train_timesteps, (len(x_0),), device=x_0.device)
    noise = torch.randn_like(x_0)
    x_t = process.q_sample(x_0, t, noise)
    output = unet(x_t, t, **({} if labels is None else {"class_labels": labels})).sample.float()

    if config.objective == "vlb":
        return vlb(process, output, x_0, x_t, t, config.prediction_type, config.variance_type), t
    prediction = output[:, : x_0.shape[1]]
    weight = loss_weight(
        process, t, config.prediction_type, config.weighting,
        snr_gamma=config.snr_gamma or 5.0, p2_gamma=config.p2_gamma, p2_k=config.p2_k,
    )  # fmt: skip
    losses = weight * l_simple(prediction, target(process, x_0, noise, t, config.prediction_type))
    if config.objective == "hybrid":
        bound = vlb(process, detach_mean(output), x_0, x_t, t, config.prediction_type, config.variance_type)
        losses = losses + config.vlb_weight * bound
    return losses, t


def target(process: DDPMProcess, x_0: Tensor, noise: Tensor, t: Tensor, prediction_type: PredictionType) -> Tensor:
    """What the network is trained to predict: ε, x_0 or v, of the shape of x_0."""
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
    - min_snr_v: min(SNR + 1, γ) ‖x_0 - x̂_0‖², which is ‖v - v̂‖² where SNR + 1 < γ.
    - p2: ‖ε - ε̂‖² / (k + SNR)^γ (arXiv 2204.00227, Eq. 8).

    Returns:
        float32 of the shape of t.
    """
    if weighting == "uniform":
        return torch.ones(t.shape, device=t.device)
    snr = process.snr(t).clamp(min=torch.finfo(torch.float32).tiny)  # 0 with zero terminal SNR
    of_x_0 = {
        "snr": lambda: snr,
        "min_snr": lambda: snr.clamp(max=snr_gamma),
        "min_snr_v": lambda: (snr + 1).clamp(max=snr_gamma),
        "p2": lambda: snr * (p2_k + snr) ** -p2_gamma,
    }[weighting]()
    # ‖ε - ε̂‖² = SNR ‖x_0 - x̂_0‖², and ‖v - v̂‖² = (SNR + 1) ‖x_0 - x̂_0‖²
    of_prediction = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
    return (of_x_0 / of_prediction).float().to(t.device)


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


def detach_mean(model_output: Tensor) -> Tensor:
    """The output for a learned variance, (B, 2C, *), without gradient through its first half, which gives the mean.

    So the bound trains the variance alone, and L_simple the mean (arXiv 2102.09672, Section 3.1).
    """
    prediction, raw_variance = model_output.chunk(2, dim=1)
    return torch.cat([prediction.detach(), raw_variance], dim=1)


def trivial_loss(process: DDPMProcess, config: TrainConfig, mean_square: float) -> float | None:
    """The expected loss of a network that predicts 0, above which nothing has been learned.

    It is E‖ε‖²/d = 1, E‖x_0‖²/d, or ᾱ E‖ε‖²/d + (1 - ᾱ) E‖x_0‖²/d for v, weighted and averaged over t.

    Args:
        mean_square: of the images in [-1, 1].

    Returns:
        None for the bound, whose value depends on more than the mean square.
    """
    if config.objective == "vlb":
        return None
    t = torch.arange(process.num_train_timesteps)
    signal = process.snr(t) / (process.snr(t) + 1)
    squares = {
        "epsilon": torch.ones_like(signal),
        "sample": torch.full_like(signal, mean_square),
        "v_prediction": signal + (1 - signal) * mean_square,
    }[config.prediction_type]
    weight = loss_weight(
        process, t, config.prediction_type, config.weighting,
        snr_gamma=config.snr_gamma or 5.0, p2_gamma=config.p2_gamma, p2_k=config.p2_k,
    )  # fmt: skip
    return float((weight * squares).mean())
