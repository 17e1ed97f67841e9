"""What a weight file of another code base is to this one: a `UNet2DModel` configuration, its weights by diffusers'
names, and the network's forward pass as its own code computes it, to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

Weights = dict[str, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class OriginalNetwork:
    """A network of another code base.

    Args:
        config: arguments of `UNet2DModel`, without `sample_size`.
        weights: by the names that `UNet2DModel` gives them.
        forward: (x, t, labels or None) → the output, for x of shape (B, C, H, W) and t of shape (B,), as the code base
            itself computes it, in the precision of `x`.
    """

    config: dict[str, Any]
    weights: Weights
    forward: Forward


class Renaming:
    """Takes weights from a file by their old names and keeps them by new ones; every one must be taken once."""

    def __init__(self, source: Weights) -> None:
        self.left = dict(source)
        self.taken: Weights = {}

    def layer(self, old: str, new: str) -> None:
        """A layer's weight and bias."""
        for part in ("weight", "bias"):
            self.taken[f"{new}.{part}"] = self.take(f"{old}.{part}")

    def resnet(self, old: str, new: str, layers: dict[str, str], shortcut: str) -> None:
        """The layers of a residual block, and its shortcut if it has one."""
        for a, b in layers.items():
            self.layer(f"{old}.{a}", f"{new}.{b}")
        if f"{old}.{shortcut}.weight" in self.left:
            self.layer(f"{old}.{shortcut}", f"{new}.conv_shortcut")

    def take(self, old: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: where the file does not have it.
        """
        if old not in self.left:
            raise ValueError(f"the weight file has no {old}, which its architecture needs: it is not complete.")
        return self.left.pop(old)

    def finish(self) -> Weights:
        """All weights by their new names.

        Raises:
            ValueError: where the file has more than `UNet2DModel` has a place for.
        """
        if self.left:
            raise ValueError(
                f"the weight file has {len(self.left)} tensors that UNet2DModel has no place for "
                f"({next(iter(self.left))} …): this architecture can't be converted exactly."
            )
        return self.taken


def group_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """GroupNorm of 32 groups, as both code bases have it."""
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def conv(weights: Weights, name: str, x: Tensor, **options: Any) -> Tensor:
    """A convolution that keeps the size, unless `options` say otherwise."""
    kernel = weights[f"{name}.weight"]
    options = {"padding": kernel.shape[-1] // 2, **options}
    return F.conv2d(
        x, kernel.reshape(*kernel.shape[:2], *(kernel.shape[2:] * 2)[:2]), weights[f"{name}.bias"], **options
    )


def in_precision(weights: Weights, dtype: torch.dtype) -> Weights:
    """The weights in another precision."""
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """A linear layer."""
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def frequencies(t: Tensor, channels: int, last: int) -> Tensor:
    """T times 10000^(-i / last), for i = 0 … channels/2 - 1: (B,) → (B, channels // 2), in float32."""
    i = torch.arange(channels // 2, dtype=torch.float32)
    return t.float()[:, None] * torch.exp(-math.log(10000) * i / last)


def uniform(values: set[Any], what: str) -> Any:
    """The one value of a set.

    Raises:
        ValueError: where there are several, which `UNet2DModel` can't express.
    """
    if len(values) != 1:
        raise ValueError(f"{what} must be the same everywhere in a UNet2DModel, but are {sorted(values)}.")
    return next(iter(values))
