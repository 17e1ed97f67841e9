"""Bits per dimension: the variational bound of arXiv 2006.11239, Eq. 5, term by term, and its rate and distortion.

A trajectory of K timesteps is a DDPM of K steps, with a bound of its own, so that likelihoods compare trajectories and
variances as well as networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.pixels import LEVELS_PER_UNIT, normalize
from ..diffusion.ddpm_process import (
    LEARNED_VARIANCE_TYPES,
    VARIANCE_TYPES,
    DDPMProcess,
    PMeanVariance,
    VarianceType,
    check_choice,
    check_integer,
)
from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..distributed import sum_over_processes
from .predictions import NoisyImages, Prediction, on_cpu


@dataclass(frozen=True)
class BitsPerDim:
    """The bound on a data set. Terms are in bits/dim, errors are of data in [-1, 1], tables are float64 on the CPU.

    Args:
        total: L_T + Σ terms, averaged over the images.
        standard_error: of the total: over images, their noise and, of an estimate, the choice of timesteps.
        L_T: the prior's term.
        terms: (K,), for each timestep t the term of the step from it: L_{t-1}, and L_0 for the last one. In an
            estimate, NaN for a timestep that no image visited.
        x_0_mse: (K,), E‖x_0 - x̂_0‖²/d of the clipped x̂_0.
        eps_mse: (K,), E‖ε - ε̂‖²/d.
        timesteps: the K timesteps, descending.
        variance_type: of the reverse process.
        num_images: how many images were used.
        calls_per_image: network calls; K, unless it is an estimate.
        of_images: (n,), the total of each image, where it is known.
    """

    total: float
    standard_error: float
    L_T: float
    terms: Tensor
    x_0_mse: Tensor
    eps_mse: Tensor
    timesteps: list[int]
    variance_type: str
    num_images: int
    calls_per_image: int
    of_images: Tensor | None = None

    @property
    def L_0(self) -> float:
        """The decoder's term: the distortion of a lossless code."""
        return float(self.terms[-1])


class RateDistortion(NamedTuple):
    """Progressive lossy coding (arXiv 2006.11239, Section 4.3, Fig. 5), one point per timestep, descending.

    Attributes:
        timesteps: t, (K,): the receiver knows x_t.
        rate: bits/dim sent so far, (K,), float64.
        distortion: RMSE of x̂_0 on the scale of 0 to 255, (K,), float64.
    """

    timesteps: list[int]
    rate: Tensor
    distortion: Tensor


def bits_per_dim(
    pipe: DDPMPipelineCustom,
    images: Tensor,
    *,
    num_inference_steps: int | None = None,
    timesteps: Sequence[int] | Tensor | str | None = None,
    variance_type: VarianceType | None = None,
    calls_per_image: int | None = None,
    num_images: int | None = None,
    indices: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 64,
    class_labels: int | Sequence[int] | Tensor | None = None,
    title: str = "Likelihood",
    show_progress: bool = True,
) -> BitsPerDim:
    """The variational bound on -log₂ p(x_0), in bits/dim (arXiv 2006.11239, Eq. 5 and 13).

    Every term of every image is computed, or with `calls_per_image` an unbiased estimate: L_0 and a systematic random
    sample of the other timesteps, evenly spread over the trajectory. Under `accelerate launch` the images are
    distributed by index.

    Args:
        images: uint8 of shape (N, C, H, W).
        num_inference_steps: K, spread by the scheduler's spacing; by default T.
        timesteps: the trajectory itself, or the name of a spacing for the K steps: as in the pipeline's call.
        variance_type: of the reverse process; by default the scheduler's. `optimal` needs a calibration.
        calls_per_image: network calls per image, from 2 to K - 1, for an estimate.
        num_images: how many of the images to use, drawn by `seed`; by default all.
        indices: the indices of those to use, int64 (n,), instead of `num_images`.
        seed: fixes the choice of images, their noise, and the timesteps of an estimate.
        batch_size: images per network call and process.
        class_labels: for a class-conditional network: one label for all images, or N of them.
        title: of the progress bar on the main process.

    Raises:
        ValueError: before anything is computed, for any bad argument.
    """
    noisy = NoisyImages(pipe, images, num_images, seed, batch_size, class_labels, chosen=indices)
    chain = ReverseChain(pipe, num_inference_steps, timesteps, variance_type)
    K, n = len(chain.timesteps), len(noisy.indices)
    columns = _columns(K, n, calls_per_image, seed)
    m = columns.shape[1]

    # Row 0 counts the images that visited a timestep; then Σ of the term, of the error of x̂_0, and of that of ε̂.
    sums = torch.zeros(4, K, dtype=torch.float64)
    totals = torch.zeros(n, dtype=torch.float64)
    visited = chain.timesteps[columns]
    predictions = noisy.predictions(visited, same_noise=False, title=title, show_progress=show_progress)
    measured = (((p.rows, p.column), chain.measure(p, columns[p.rows, p.column])) for p in predictions)
    for (rows, column), values in on_cpu(measured):
        k = columns[rows, column]
        sums.index_add_(1, k, torch.cat([torch.ones(1, len(k), dtype=torch.float64), values]))
        # Of the K - 1 terms before L_0, an estimate sees m - 1: each stands for as many.
        weight = 1.0 if column == m - 1 else (K - 1) / (m - 1)
        totals[rows] += weight * values[0]

    sums, totals = sum_over_processes(sums), sum_over_processes(totals)
    terms, x_0_mse, eps_mse = sums[1:] / sums[0]
    priors = chain.L_T(normalize(noisy.images[noisy.indices]))
    totals += priors
    L_T = priors.mean()
    return BitsPerDim(
        float(totals.mean()), float(totals.std() / math.sqrt(n)), float(L_T), terms, x_0_mse, eps_mse,
        chain.timesteps.tolist(), chain.variance_type, n, m, totals,
    )  # fmt: skip


def combine(parts: Sequence[BitsPerDim]) -> BitsPerDim:
    """The bound on a data set from exact bounds on its parts with the same chain."""
    n = torch.tensor([part.num_images for part in parts], dtype=torch.float64)
    N, first = float(n.sum()), parts[0]

    def mean(name: str) -> Tensor:
        values = torch.stack([torch.as_tensor(getattr(part, name), dtype=torch.float64) for part in parts])
        return torch.tensordot(n / N, values, dims=1)

    total = mean("total")
    within = sum((p.standard_error * p.num_images) ** 2 * (1 - 1 / p.num_images) for p in parts)
    between = sum(p.num_images * (p.total - float(total)) ** 2 for p in parts)
    return replace(
        first,
        total=float(total),
        standard_error=math.sqrt((within + between) / (N - 1) / N),
        L_T=float(mean("L_T")),
        terms=mean("terms"),
        x_0_mse=mean("x_0_mse"),
        eps_mse=mean("eps_mse"),
        num_images=int(N),
        of_images=None,
    )


def rate_distortion(bits: BitsPerDim) -> RateDistortion:
    """Rate against distortion along the reverse process (arXiv 2006.11239, Fig. 5 and Table 4).

    The last point has the whole rate, L_T + Σ L_{t-1}; the distortion term of the lossless code is L_0 of `bits`.

    Raises:
        ValueError: for an estimate that left timesteps out.
    """
    if bits.terms.isnan().any():
        raise ValueError(
            f"{int(bits.terms.isnan().sum())} of {len(bits.terms)} timesteps were left out by the estimate with "
            f"{bits.calls_per_image} calls per image: leave calls_per_image out, or use more images."
        )
    sent_before = torch.cat([bits.terms.new_zeros(1), bits.terms[:-1].cumsum(0)])
    return RateDistortion(bits.timesteps, bits.L_T + sent_before, bits.x_0_mse.sqrt() * LEVELS_PER_UNIT)


class ReverseChain:
    """The reverse process of a trajectory and a variance, whose terms are measured.

    Args:
        pipe: gives the scheduler. The other arguments are those of `bits_per_dim`, and
        x_0_error: float64 (T,), for the variance `optimal` of another calibration than the scheduler's.

    Raises:
        ValueError: for a trajectory or a variance that the model does not have.
    """

    def __init__(
        self,
        pipe: DDPMPipelineCustom,
        num_inference_steps: int | None,
        timesteps: Sequence[int] | Tensor | str | None,
        variance_type: VarianceType | None,
        x_0_error: Tensor | None = None,
    ) -> None:
        self.variance_type: VarianceType = variance_type or pipe.scheduler.variance_type
        check_choice("variance_type", self.variance_type, VARIANCE_TYPES)
        has_variance = pipe.unet.config.out_channels > pipe.unet.config.in_channels
        if self.variance_type in LEARNED_VARIANCE_TYPES and not has_variance:
            raise ValueError(
                f"`variance_type` is {self.variance_type!r}, but the network predicts no variance: choose a fixed one, "
                "or 'optimal' after a calibration."
            )
        self.scheduler: DDPMSchedulerCustom = pipe.scheduler_on_trajectory(num_inference_steps, timesteps)
        self.timesteps: Tensor = self.scheduler.timesteps.cpu()
        self.process: DDPMProcess = self.scheduler.process.on_trajectory(self.timesteps)
        if x_0_error is None and self.variance_type == "optimal":
            x_0_error = self.scheduler.calibration.x_0_error
        self.x_0_error = x_0_error

    def L_T(self, x_0: Tensor) -> Tensor:
        """The prior's term of a chain that starts where this one does, (B,), float64 on the CPU."""
        return self.process.L_T(x_0, int(self.timesteps[0])).cpu().double()

    def measure(self, p: Prediction, k: Tensor) -> Tensor:
        """The term, the error of x̂_0 and that of ε̂ at timesteps[k], (3, B)."""
        prediction = p.output[:, : p.x_t.shape[1]]
        reverse = self.p_mean_variance(p, prediction)
        if (k == len(self.timesteps) - 1).all():
            term = self.process.L_0(p.x_0, reverse)
        else:
            term = self.process.L_t_minus_1(p.x_0, p.x_t, p.t, reverse, self.scheduler.previous_timestep(p.t))
        eps_error = self.process.predict_eps(prediction, p.x_t, p.t, self.scheduler.config.prediction_type) - p.noise
        return torch.stack([term, _mean_square(p.x_0 - reverse.pred_x_0), _mean_square(eps_error)])

    def p_mean_variance(self, p: Prediction, prediction: Tensor) -> PMeanVariance:
        """p_θ(x_s | x_t) with the requested variance."""
        return self.process.p_mean_variance(
            p.output if self.variance_type in LEARNED_VARIANCE_TYPES else prediction,
            p.x_t,
            p.t,
            self.scheduler.previous_timestep(p.t),
            prediction_type=self.scheduler.config.prediction_type,
            variance_type=self.variance_type,
            x_0_error=None if self.x_0_error is None else self.x_0_error[p.t],
            clip=self.scheduler.limit_x_0,
        )


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


def _columns(K: int, n: int, calls_per_image: int | None, seed: int) -> Tensor:
    """The positions in the trajectory that each of n images visits, (n, K) or (n, calls_per_image), K - 1 last."""
    if calls_per_image is None:
        return torch.arange(K).expand(n, K)
    check_integer("calls_per_image", calls_per_image, 2, K - 1)
    # Systematic sampling: a comb of m teeth, shifted at random for each image, visits every term equally often.
    m = calls_per_image - 1
    shift = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    comb = ((torch.arange(m) + shift) * ((K - 1) / m)).long().clamp(max=K - 2)
    return torch.cat([comb, torch.full((n, 1), K - 1)], dim=1)
