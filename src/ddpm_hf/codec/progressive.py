"""Progressive lossy compression (arXiv 2006.11239, Section 4.3, Algorithms 3 and 4) in real bits.

Sender and receiver follow one reverse chain of K least-cost timesteps with the optimal variance. At each, both compute
x̂_0 from x_t (Eq. 15), which is the receiver's picture so far; then bits steer x_s towards q(x_s | x_t, x_0), see
`channel`. How many is known beforehand: the step's term of the bound, ½ ln(σ_p²/σ_q²) nats per value, from the
calibration. So the code needs no entropy coder, any prefix of it is of use, and no rounding of a network can make the
receiver misread it.

The values of all images are sent together: bits go where they are needed most, and the code is better the longer it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..diffusion.ddpm_process import DDPMProcess
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from .channel import SharedRandomness, bits_for, steer, steered_noise

Bits = NDArray[np.uint8]  # of 0 and 1
BitsOf = Callable[[int, Tensor], Bits | None]
ERROR_STEPS = 128  # per octave, in which a file has the errors of x̂_0
SMALLEST_ERROR = 1e-12
Predict = Callable[[Tensor, int], Tensor]


class Step(NamedTuple):
    """The step from t to s. x_s = mean_from_x_0 x̂_0 + mean_from_x_t x_t + std z.

    Attributes:
        ratio: σ_q²/σ_p².
    """

    t: int
    s: int
    mean_from_x_0: float
    mean_from_x_t: float
    std: float
    ratio: float

    @property
    def bits_per_value(self) -> float:
        """The step's term of the bound, -½ log₂ ratio."""
        return -0.5 * math.log2(self.ratio)

    def num_bits(self, count: int) -> int:
        """Those that are sent for so many values; at most one per value."""
        return min(count, bits_for(count * self.bits_per_value))


class Chain(NamedTuple):
    """What a file says of its chain.

    Attributes:
        timesteps: K of them, descending.
        errors: log₂ e_t of each, in 1/128: see `Calibration`.
    """

    timesteps: list[int]
    errors: list[int]


def best_chain(scheduler: DDPMSchedulerCustom, num_inference_steps: int) -> Chain:
    """The chain of the K least-cost timesteps.

    Raises:
        ValueError: for a scheduler without a calibration.
    """
    timesteps = scheduler.optimal_timesteps(num_inference_steps)
    errors = scheduler.calibration.x_0_error[timesteps].tolist()
    return Chain(timesteps, [round(ERROR_STEPS * math.log2(max(error, SMALLEST_ERROR))) for error in errors])


def plan_steps(process: DDPMProcess, chain: Chain) -> list[Step]:
    """The steps from x_T to x_0: K - 1 of them, since x̂_0 is the picture after the last."""
    steps = []
    for (t, s), error in zip(itertools.pairwise(chain.timesteps), chain.errors, strict=False):
        c_0, c_t, q_variance = (float(c) for c in process.posterior_coefficients(t, s))
        p_variance = q_variance + c_0**2 * 2.0 ** (error / ERROR_STEPS)
        steps.append(Step(t, s, c_0, c_t, math.sqrt(p_variance), q_variance / p_variance))
    return steps


def follow(
    predict: Predict, steps: Sequence[Step], shape: Sequence[int], shared: SharedRandomness, bits_of: BitsOf
) -> Tensor:
    """Follow the chain as both sides do, and return x̂_0 where it ends.

    Args:
        predict: x̂_0 from x_t and t.
        steps: of `plan_steps`.
        shape: of the images, (N, C, H, W).
        shared: the randomness of both sides.
        bits_of: the bits of step k, given k and x̂_0, of which there are `step.num_bits` or none: then the receiver's
            noise is drawn, as in sampling. None ends the chain.

    Returns:
        float32 of this shape, in the range of the network's data.
    """
    count = math.prod(shape)
    x = torch.from_numpy(shared.noise(0, count)).reshape(*shape)
    for k, step in enumerate(steps):
        x_0 = predict(x, step.t)
        bits = bits_of(k, x_0)
        if bits is None:
            return x_0
        noise = torch.from_numpy(steered_noise(shared, k + 1, bits, count)).reshape(*shape)
        x = step.mean_from_x_0 * x_0 + step.mean_from_x_t * x + step.std * noise
    return predict(x, steps[-1].s)


def bits_to_send(steps: Sequence[Step], x_0: Tensor, shared: SharedRandomness) -> Callable[[int, Tensor], Bits]:
    """The sender's side of `follow`: the bits of step k that steer towards images x_0, (N, C, H, W), in [-1, 1]."""

    def bits_of(k: int, prediction: Tensor) -> Bits:
        step = steps[k]
        shift = (x_0 - prediction).flatten().numpy() * (step.mean_from_x_0 / step.std)
        return steer(shared, k + 1, shift, step.ratio, step.num_bits(len(shift)))

    return bits_of
