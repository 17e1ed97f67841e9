"""Averages of the weights by power functions, of several widths.

A power-function average of relative width σ covers the same part of a run however long that is, and needs no length in
updates (Karras et al. 2024, arXiv 2312.02696, Section 3).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel

from .network import build_ema, local_weights

if TYPE_CHECKING:
    from ..config.training import TrainConfig

EVERY = 4  # updates between two steps of an average: its shortest length is hundreds of them
LOSSES = 256  # with which averages are compared, at least


def power_of_width(width: float) -> float:
    """γ of the profile t^γ on [0, 1] whose standard deviation is `width`.

    Under the density (γ+1) t^γ, the mean is (γ+1)/(γ+2) and the variance (γ+1) / ((γ+2)² (γ+3)): the largest root of
    σ² (γ+2)² (γ+3) - (γ+1) = 0.
    """
    s = width**2
    roots = np.roots([s, 7 * s, 16 * s - 1, 12 * s - 1])
    return float(max(roots.real))


class PowerFunctionEMA(EMAModel):
    """The average of the weights θ(1), …, θ(n) with the weights k^γ, as a running average: β = (1 - 1/n)^(γ+1)."""

    def __init__(self, weights: Iterable[Any], width: float, foreach: bool) -> None:
        self.width, self.power_of_time = width, power_of_width(width)
        super().__init__(weights, foreach=foreach)

    def get_decay(self, optimization_step: int) -> float:
        """β of step n ≥ 1, at which the first weights are replaced: 0 for n = 1."""
        return (1 - 1 / max(1, optimization_step)) ** (self.power_of_time + 1)


def build_averages(config: TrainConfig, unet: torch.nn.Module) -> tuple[EMAModel | None, list[PowerFunctionEMA]]:
    """The average that is exported, and others that may be in the end; none without `use_ema`."""
    ema = build_ema(config, unet)
    if ema is None or not config.ema_widths:
        return ema, []
    weights = local_weights(unet)
    averages = [PowerFunctionEMA(weights, width, ema.foreach) for width in sorted(config.ema_widths)]
    return averages.pop(len(averages) // 2), averages
