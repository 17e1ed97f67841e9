"""Bits-back coding along the chain, in the Markov order (Bit-Swap, arXiv 1905.06845, for the chain of DDPM).

A latent is drawn from q with bits that are on the stack already, and what lies below it is pushed under p; the draw
costs nothing, since the decoder puts its bits back. Drawn one level after the other, at most two latents are borrowed
at any time, whatever the number of levels:

    encode: pop z_1 ~ q(z_1 | x_0), push x_0 under p(x_0 | z_1), pop z_2 ~ q(z_2 | z_1), push z_1 under p(z_1 | z_2), …
    decode: the same, backwards

On average, an image adds the variational bound (arXiv 2006.11239, Eq. 5) to the stack.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..diffusion.ddpm_process import split_model_output
from ..diffusion.pipeline import DDPMPipelineCustom
from ..evaluation.likelihood import ReverseChain
from .arithmetic import predict
from .levels import Level, real
from .stack import GRID, MAX_LEVEL, SQRT_2_PI_E, BitStack, Integers

PIXEL_GRID = 8  # binary digits behind the point of a mean of pixels, whose standard deviation may be below a level
STD_GRID = 64  # a predicted standard deviation is 2^(j / 64)
FINEST_STD, COARSEST_STD = -12 * STD_GRID, 24 * STD_GRID

Watch = Callable[[int, int, "Reverse", Integers], None]  # the level, the bits that it added, p(below | z) and z


@dataclass(frozen=True)
class Reverse:
    """p(below | z) of a level: means and standard deviations in units below, float64 (n,), as they are coded.

    `x_0` is x̂_0, float64 (B, C, H, W).
    """

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    x_0: Tensor


@dataclass
class Model:
    """A network and its chain, for images of one shape.

    Args:
        pipeline: gives the network and how x̂_0 is limited.
        chain: the trajectory and the variance.
        levels: those of the chain.
        class_label: of all images, for a class-conditional network.
        network_seconds: what its calls have taken.
    """

    pipeline: DDPMPipelineCustom
    chain: ReverseChain
    levels: list[Level]
    class_label: int | None = None
    network_seconds: float = 0.0

    def reverse(self, z: Integers, level: Level, is_lowest: bool) -> Reverse:
        """p(below | z): one network call.

        Args:
            z: bins, (B, C, H, W).
        """
        x = torch.from_numpy(np.ldexp(z.astype(np.float64), -level.exponent))  # exact, in float32, too
        start = time.perf_counter()
        output = predict(self.pipeline.unet, x.float(), level.t, self.class_label)
        self.network_seconds += time.perf_counter() - start
        output, raw_variance = self._split(output, x)
        # Separate products and sums of float64, which every machine rounds alike.
        x_0 = real(level.x_0_from_x_t) * x + real(level.x_0_from_output) * output.double()
        x_0 = self.chain.scheduler.limit_x_0(x_0)
        mean = (real(level.mean_from_x_0) * x_0 + real(level.mean_from_x_t) * x).numpy().reshape(-1)
        digits = PIXEL_GRID if is_lowest else GRID
        mean = np.ldexp(np.rint(np.ldexp(mean + MAX_LEVEL / 2 if is_lowest else mean, digits)), -digits)
        if raw_variance is None:
            std = np.full(len(mean), real(level.p_std))
        else:
            log_std = real(level.log_std) + real(level.log_std_slope) * raw_variance.double().numpy().reshape(-1)
            grid = np.rint(STD_GRID * log_std.clip(FINEST_STD / STD_GRID, COARSEST_STD / STD_GRID))
            std = _stds()[grid.astype(np.int64) - FINEST_STD]
        return Reverse(mean, std, x_0)

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.levels[0].p_std:  # what the network may say of the variance is left aside
            return output[:, : x.shape[1]], None
        return split_model_output(output, x, self.chain.variance_type)


class Pushed(NamedTuple):
    """What became of a stack: the bits that were borrowed at most, and those of the uppermost latent."""

    borrowed: int
    top: int


def encode_batch(
    stack: BitStack, model: Model, pixels: NDArray[np.uint8], number: int, watch: Watch | None = None
) -> Pushed:
    """Push images, (B, C, H, W), onto the stack.

    Args:
        number: of the batch.
        watch: is told what each level did.

    Raises:
        StackTooShortError: the stack is then of no use any more.
    """
    at_first = lowest_bits = stack.bits
    symbols: Integers = pixels.reshape(-1).astype(np.int64)
    below, lowest, highest = 2 * symbols - MAX_LEVEL, 0, MAX_LEVEL
    for i, level in enumerate(model.levels):
        before = stack.bits
        z = stack.pop_q(below, level)
        lowest_bits = min(lowest_bits, stack.bits)
        reverse = model.reverse(z.reshape(pixels.shape), level, is_lowest=i == 0)
        stack.push_p(symbols, reverse.mean, reverse.std, lowest, highest)
        stack.mix(number, i, count=len(symbols))
        if watch is not None:
            watch(i, stack.bits - before, reverse, z)
        symbols = below = z
        lowest, highest = -level.half, level.half
    before = stack.bits
    stack.push_p(symbols, *_prior(model.levels[-1], len(symbols)), lowest, highest)
    stack.mix(number, len(model.levels), count=len(symbols))
    return Pushed(at_first - lowest_bits, stack.bits - before)


def decode_batch(stack: BitStack, model: Model, shape: Sequence[int], number: int) -> NDArray[np.uint8]:
    """Pop the images, of this shape (B, C, H, W), that `encode_batch` pushed last, with the number of their batch."""
    top = model.levels[-1]
    count = math.prod(shape)
    stack.mix(number, len(model.levels), count=count)
    z = stack.pop_p(*_prior(top, count), -top.half, top.half)
    for i in reversed(range(len(model.levels))):
        level = model.levels[i]
        reverse = model.reverse(z.reshape(shape), level, is_lowest=i == 0)
        half = model.levels[i - 1].half
        lowest, highest = (0, MAX_LEVEL) if i == 0 else (-half, half)
        stack.mix(number, i, count=count)
        symbols = stack.pop_p(reverse.mean, reverse.std, lowest, highest)
        stack.push_q(z, 2 * symbols - MAX_LEVEL if i == 0 else symbols, level)
        z = symbols
    return z.astype(np.uint8).reshape(shape)


def borrowed_bits(levels: Sequence[Level]) -> float:
    """About how many bits per value an image borrows at most: the two lowest latents."""
    return sum(math.log2(SQRT_2_PI_E * real(level.q_std)) for level in levels[:2])


def latent_bits(level: Level, variance: float) -> float:
    """Bits per value of a latent in its bins, drawn from q(z | x_0) of this variance."""
    return math.log2(SQRT_2_PI_E * math.sqrt(variance)) + level.exponent


def _prior(level: Level, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.zeros(count), np.full(count, 2.0**level.exponent)


@cache
def _stds() -> NDArray[np.float64]:
    """2^(j / 64) of every j, by integer square roots, so that no library's power function is involved."""
    mantissas = []
    for k in range(STD_GRID):
        root = 1 << (k + 52 * STD_GRID)
        for _ in range(STD_GRID.bit_length() - 1):
            root = math.isqrt(root)
        mantissas.append(math.ldexp(root, -52))
    j: Any = np.arange(FINEST_STD, COARSEST_STD + 1)
    powers: Any = np.ldexp(np.array(mantissas)[j % STD_GRID], j // STD_GRID)
    return powers
