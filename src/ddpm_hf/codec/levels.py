"""The chain that a codec follows, in integers: for each latent its bins, and the coefficients of q and p.

Level i of the K has the latent z_i = x_t of the i-th smallest timestep of the trajectory; below level 1 lies the image,
z_0 = x_0. A latent is a whole number of bins, whose width is a power of two, so that z_i is exact in float32. What
follows from the scheduler is computed once in float64 and rounded to fixed-point integers, which are hashed: rounding
hides the last digits, in which machines differ, and the hash shows where it did not.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import astuple, dataclass

import numpy as np
import torch

from ..diffusion.ddpm_process import LEARNED_VARIANCE_TYPES
from ..evaluation.likelihood import ReverseChain

FRACTION = 32  # binary digits behind the point of the coefficients
# Standard deviations of x_t beyond the range of images, in which its bins lie. More than the 8 to which q is cut: bins
# are a circle, and draws that are further apart than it is long would be one bin.
SPAN = 9.0
WIDEST_IMAGE = 255  # x_0 of level v is (2 v - 255) / 255


@dataclass(frozen=True)
class Level:
    """One latent z = x_t, in bins of width 2^-exponent from -half to half, and the level below it.

    Coefficients are integers, in units of 2^-32.

    Args:
        t: the timestep.
        exponent: of the bins.
        half: the number of the highest bin.
        q_ratio: the mean of q(z | below) in bins, per unit below: a bin, or 1/255 of the range of images.
        q_std: the standard deviation of q(z | below), in bins.
        x_0_from_x_t, x_0_from_output: x̂_0 of x_t and the network's output.
        mean_from_x_0, mean_from_x_t: the mean of p(below | z), in units below.
        p_std: the standard deviation of p(below | z), in units below; 0 where the network predicts it.
        log_std, log_std_slope: then log₂ of it is log_std + log_std_slope · the network's output.
    """

    t: int
    exponent: int
    half: int
    q_ratio: int
    q_std: int
    x_0_from_x_t: int
    x_0_from_output: int
    mean_from_x_0: int
    mean_from_x_t: int
    p_std: int
    log_std: int
    log_std_slope: int


def real(fixed: int) -> float:
    """The number that a fixed-point integer stands for."""
    return math.ldexp(fixed, -FRACTION)


def make_levels(chain: ReverseChain, bins_per_std: int) -> list[Level]:
    """The levels of a reverse chain, from the data upwards.

    Args:
        bins_per_std: at least this many bins in the smallest standard deviation that a latent is coded with.
    """
    process, scheduler = chain.process, chain.scheduler
    ascending = chain.timesteps.flip(0)
    t, s = ascending, torch.cat([torch.tensor([-1]), ascending[:-1]])
    a, b = process.x_0_coefficients(t, scheduler.config.prediction_type)
    c_0, c_t, _ = process.posterior_coefficients(t, s)
    is_learned = chain.variance_type in LEARNED_VARIANCE_TYPES
    low, high = process.p_log_variance(t, s, "fixed_small"), process.p_log_variance(t, s, "fixed_large")
    error = None if chain.x_0_error is None else chain.x_0_error[t]
    fixed = low if is_learned else process.p_log_variance(t, s, chain.variance_type, x_0_error=error)
    q_std = process.beta(t, s).sqrt()
    signal, noise = process.alpha_bar(t).sqrt(), process.one_minus_alpha_bar(t).sqrt()
    signal_below = process.alpha_bar(s).sqrt()

    # A latent is drawn from q and coded with p of the level above it, the uppermost one with N(0, 1).
    p_std_above = torch.cat([(fixed / 2).exp()[1:], torch.ones(1, dtype=torch.float64)])
    exponents = [math.ceil(math.log2(bins_per_std / width)) for width in torch.minimum(q_std, p_std_above).tolist()]
    per_unit_below = [WIDEST_IMAGE / 2, *(2.0**e for e in exponents[:-1])]
    # log σ of p, in nats, is `log_std` + `slope` · output: constant, the output's half, or between two by the output.
    if chain.variance_type == "learned_range":
        log_std, slope = (low + high) / 4, (high - low) / 4
    else:
        log_std, slope = (torch.zeros_like(low), torch.full_like(low, 0.5)) if is_learned else (fixed / 2, low * 0)
    levels = []
    for i, (e, unit) in enumerate(zip(exponents, per_unit_below, strict=True)):
        # Of the data, q reads 2 v - 255, which is x_0 in units of 1/255.
        ratio = float(signal[i] / signal_below[i]) * 2.0**e / (WIDEST_IMAGE if i == 0 else unit)
        log_2_std = (float(log_std[i]) + math.log(unit)) / math.log(2)
        levels.append(
            Level(
                t=int(t[i]),
                exponent=e,
                half=math.ceil((float(signal[i]) + SPAN * float(noise[i])) * 2.0**e),
                q_ratio=_fixed(ratio),
                q_std=_fixed(float(q_std[i]) * 2.0**e),
                x_0_from_x_t=_fixed(float(a[i])),
                x_0_from_output=_fixed(float(b[i])),
                mean_from_x_0=_fixed(float(c_0[i]) * unit),
                mean_from_x_t=_fixed(float(c_t[i]) * unit),
                p_std=0 if is_learned else _fixed(2.0**log_2_std),
                log_std=_fixed(log_2_std) if is_learned else 0,
                log_std_slope=_fixed(float(slope[i]) / math.log(2)) if is_learned else 0,
            )
        )
    return levels


def hash_levels(levels: list[Level]) -> str:
    """Sixteen hexadecimal digits that identify the integers of a chain."""
    return hashlib.sha256(np.array([astuple(level) for level in levels], "<i8").tobytes()).hexdigest()[:16]


def _fixed(value: float) -> int:
    return round(value * 2**FRACTION)
