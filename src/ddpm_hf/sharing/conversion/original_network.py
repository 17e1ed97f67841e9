"""A network of another code base: the `UNet2DModel` that equals it, and its own forward pass to compare with."""

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
        weights: by their names in `UNet2DModel`.
        forward: (x, t, labels or None) → the output, for x of shape (B, C, H, W) and t of shape (B,), computed as the
            code base does, in the precision of `x`.
    """

    config: dict[str, Any]
    weights: Weights
    forward: Forward


class Renaming:
    """Moves weights from their original names to new ones; every one must be moved once."""

    def __init__(self, original: Weights) -> None:
        self.left = dict(original)
        self.renamed: Weights = {}

    def layer(self, old: str, new: str) -> None:
        """A layer's weight and bias."""
        for part in ("weight", "bias"):
            self.renamed[f"{new}.{part}"] = self.take(f"{old}.{part}")

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
            raise ValueError(f"the weight file lacks {old}, which its architecture needs: it is incomplete.")
        return self.left.pop(old)

    def finish(self) -> Weights:
        """All weights by their new names.

        Raises:
            ValueError: where the file has more than `UNet2DModel` takes.
        """
        if self.left:
            raise ValueError(
                f"the weight file has {len(self.left)} tensors that UNet2DModel has no place for "
                f"({next(iter(self.left))} …): this architecture can't be converted exactly."
            )
        return self.renamed


class Layers:
    """The layers of an original network, in the precision `dtype`, by the names of their weights."""

    def __init__(self, weights: Weights, dtype: torch.dtype, eps: float) -> None:
        self.weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
        self.eps = eps

    def __contains__(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def __getitem__(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        """GroupNorm of 32 groups, which both code bases use."""
        return F.group_norm(x, 32, *self[name], self.eps)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """A linear layer."""
        return F.linear(x, *self[name])

    def conv(self, name: str, x: Tensor, **options: Any) -> Tensor:
        """A convolution that keeps the size, unless `options` of `conv2d` differ. Kernels of one dimension are 1×1."""
        kernel, bias = self[name]
        kernel = kernel[..., None] if kernel.ndim == 3 else kernel
        return F.conv2d(x, kernel, bias, **{"padding": kernel.shape[-1] // 2, **options})


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over pixels: each (…, channels of a head, pixels), and so is the result."""
    return F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT


def upsample(x: Tensor) -> Tensor:
    """Twice the size, by repetition."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def frequencies(t: Tensor, channels: int, last: int) -> Tensor:
    """The angles t · 10000^(-i / last), for i = 0 … channels/2 - 1: (B,) → (B, channels // 2), in float32."""
    i = torch.arange(channels // 2, dtype=torch.float32)
    return t.float()[:, None] * torch.exp(-math.log(10000) * i / last)


def uniform(values: set[Any], what: str) -> Any:
    """The only value of a set.

    Raises:
        ValueError: where there are several, which `UNet2DModel` can't express.
    """
    if len(values) != 1:
        raise ValueError(f"{what} must be the same everywhere in a UNet2DModel, but are {sorted(values)}.")
    return next(iter(values))
