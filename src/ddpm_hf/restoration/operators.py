"""Measurements y = A x: descriptions (`Downsample(4)`), of which `bind` makes the `LinearMap` for images of one shape.

Images are (B, C, H, W), floating point. All operators but `Inpaint` map a constant image to the same constant.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .linear_maps import ConvolutionMap, IterativeMap, LinearMap, MaskMap, SeparableMap

ADJOINT_ERROR = 1e-3  # relative; rounding makes less than 1e-5


class Operator(ABC):
    """A linear measurement of images of any shape that fits it."""

    @abstractmethod
    def bind(
        self, image_shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LinearMap:
        """The map for images of shape (C, H, W).

        Raises:
            ValueError: where the operator does not fit such images.
        """

    def __call__(self, x: Tensor) -> Tensor:
        """A x, for images x of shape (B, C, H, W)."""
        return self.bind(x.shape[1:], x.device, x.dtype)(x)


class Inpaint(Operator):
    """Pixels where the mask is 1 are known, those where it is 0 are to be painted.

    Args:
        mask: bool or 0 and 1, of shape (H, W), (1 or C, H, W), or (B, 1 or C, H, W) for a mask per image.

    Raises:
        ValueError: for grey values or another shape.
    """

    def __init__(self, mask: Tensor) -> None:
        mask = torch.as_tensor(mask)
        values = mask if mask.dtype == torch.bool else (mask == 0) | (mask == 1)
        if mask.dtype != torch.bool and not bool(values.all()):
            wrong = float(mask[~values].reshape(-1)[0])
            raise ValueError(
                f"`mask` has the value {wrong:.4g}, but must be 1 where a pixel is known and 0 where it is to be "
                "painted: threshold it, e.g. mask > 0.5."
            )
        if mask.ndim not in (2, 3, 4):
            raise ValueError(
                f"`mask` has shape {tuple(mask.shape)}, but must be (H, W), (C, H, W) or (B, C, H, W), with C or 1 "
                "channels."
            )
        self.mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)

    @property
    def hole(self) -> Tensor:
        """Where any image has an unknown pixel, bool (H, W)."""
        return (self.mask == 0).flatten(0, 1).any(0)

    def bind(
        self, image_shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> MaskMap:
        """The map for images of this shape."""
        channels, *size = image_shape
        if list(self.mask.shape[2:]) != size or self.mask.shape[1] not in (1, channels):
            raise ValueError(
                f"`mask` has shape {tuple(self.mask.shape[1:])} (C, H, W), but the images have {tuple(image_shape)}: "
                "make it of their height and width, with 1 channel or as many."
            )
        return MaskMap(self.mask.to(device, dtype), image_shape)


class Separable(Operator):
    """An operator that is one matrix per axis. Subclasses say which."""

    @abstractmethod
    def matrices(self, image_shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 matrices (C', C), (H', H), (W', W) for images of shape (C, H, W)."""

    def bind(
        self, image_shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> SeparableMap:
        """The map for images of this shape."""
        return SeparableMap(*self.matrices(image_shape), torch.device(device), dtype)


class Downsample(Separable):
    """Images smaller by a whole factor.

    Args:
        factor: at least 2; must divide height and width.
        filter: "bicubic" (a = -1/2, antialiased, as Pillow's `Image.resize`, without its rounding) or "box" (the means
            of blocks).
    """

    def __init__(self, factor: int, filter: Literal["bicubic", "box"] = "bicubic") -> None:
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 2:
            raise ValueError(f"`factor` is {factor!r}, but must be an integer of at least 2.")
        if filter not in ("bicubic", "box"):
            raise ValueError(f"`filter` is {filter!r}, but must be 'bicubic' or 'box'.")
        self.factor, self.filter = factor, filter

    def matrices(self, image_shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The matrices of the three axes."""
        channels, height, width = image_shape
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"`factor` is {self.factor}, but must divide the height and width of the images, {height}×{width}."
            )
        rows, columns = (resampling_matrix(n, n // self.factor, self.filter) for n in (height, width))
        return torch.eye(channels, dtype=torch.float64), rows, columns


class Grayscale(Separable):
    """The luma of RGB images, one channel: 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601, as Pillow's mode L)."""

    def matrices(self, image_shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The matrices of the three axes."""
        channels, height, width = image_shape
        if channels != 3:
            raise ValueError(f"colours can be restored to RGB images only, but these have {channels} channel(s).")
        luma = torch.tensor([[0.299, 0.587, 0.114]], dtype=torch.float64)
        return luma, torch.eye(height, dtype=torch.float64), torch.eye(width, dtype=torch.float64)


class Blur(Operator):
    """Convolution with a kernel, at periodic boundaries.

    Args:
        kernel: (h, w), no larger than the images; it is divided by its sum.
    """

    def __init__(self, kernel: Tensor) -> None:
        kernel = torch.as_tensor(kernel, dtype=torch.float64)
        if kernel.ndim != 2 or not kernel.isfinite().all() or float(kernel.sum()) <= 0:
            raise ValueError(
                f"`kernel` has shape {tuple(kernel.shape)} and sum {float(kernel.sum()):.4g}, but must be a matrix of "
                "finite numbers with a positive sum."
            )
        self.kernel = kernel / kernel.sum()

    @classmethod
    def gaussian(cls, std: float) -> Blur:
        """A Gaussian kernel of standard deviation `std` in pixels, cut off at 3 std."""
        if not std > 0:
            raise ValueError(f"`std` is {std}, but must be positive.")
        radius = max(1, math.ceil(3 * std))
        line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / std) ** 2)
        return cls(torch.outer(line, line))

    def bind(
        self, image_shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ConvolutionMap:
        """The map for images of this shape."""
        if self.kernel.shape[0] > image_shape[1] or self.kernel.shape[1] > image_shape[2]:
            raise ValueError(
                f"`kernel` has shape {tuple(self.kernel.shape)}, but must not be larger than the images, "
                f"{image_shape[1]}×{image_shape[2]}."
            )
        return ConvolutionMap(self.kernel, image_shape, torch.device(device), dtype)


class Compose(Operator):
    """One operator after another: `Compose(Blur(kernel), Downsample(2))` blurs first."""

    def __init__(self, *operators: Operator) -> None:
        if not operators:
            raise ValueError("`Compose` needs at least one operator.")
        self.operators = operators

    def bind(
        self, image_shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LinearMap:
        """The map for images of this shape."""
        maps: list[LinearMap] = []
        shape = tuple(image_shape)
        for operator in self.operators:
            bound = operator.bind(shape, device, dtype)
            if maps and isinstance(bound, SeparableMap) and isinstance(maps[-1], SeparableMap):
                products = [b @ a for a, b in zip(maps.pop().exact, bound.exact, strict=True)]  # type: ignore[attr-defined]
                bound = SeparableMap(products[0], products[1], products[2], torch.device(device), dtype)
            maps.append(bound)
            shape = bound.measurement_shape
        if len(maps) == 1:
            return maps[0]

        def forward(x: Tensor) -> Tensor:
            for part in maps:
                x = part(x)
            return x

        def adjoint(y: Tensor) -> Tensor:
            for part in reversed(maps):
                y = part.adjoint(y)
            return y

        return IterativeMap(forward, adjoint, image_shape, shape)


class DeepInverse(Operator):
    """A linear physics of the `deepinv` package, as it is.

    Args:
        physics: an object with `A(x)` and `A_adjoint(y)`, on the device of the images.
    """

    def __init__(self, physics: Any) -> None:
        self.physics = physics

    def bind(
        self, image_shape: Sequence[int], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> IterativeMap:
        """The map for images of this shape.

        Raises:
            ValueError: for a physics that is not linear, or whose adjoint is none.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *image_shape, generator=generator).to(device, dtype)
        y = self.physics.A(x)
        z = torch.randn(y.shape, generator=generator).to(device, dtype)
        name, least = type(self.physics).__name__, ADJOINT_ERROR * y.norm()
        if (self.physics.A(-2 * x) + 2 * y).norm() > least:
            raise ValueError(
                f"`operator` {name} is not linear: pass its `A` as a function of images, and method='dps'."
            )
        if ((y * z).sum() - (x * self.physics.A_adjoint(z)).sum()).abs() > least * z.norm():
            raise ValueError(f"`operator` {name} has an `A_adjoint` that is not the adjoint of its `A`.")
        return IterativeMap(self.physics.A, self.physics.A_adjoint, image_shape, y.shape[1:])


def as_operator(operator: Any) -> Operator:
    """The operator itself, or one made of a linear physics of `deepinv`.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(operator, Operator):
        return operator
    if callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None)):
        return DeepInverse(operator)
    raise TypeError(
        f"`operator` is a {type(operator).__name__}, but must be an operator such as Inpaint(mask) or Downsample(4), "
        "or a linear physics of deepinv."
    )


def resampling_matrix(length: int, smaller: int, filter: Literal["bicubic", "box"]) -> Tensor:
    """The (smaller, length) matrix that resamples a line of pixels, float64; each row sums to 1.

    The kernel is stretched by length / smaller, as Pillow does, cut off at the borders, and normalised.
    """
    scale = length / smaller
    support = scale * (2.0 if filter == "bicubic" else 0.5)
    matrix = torch.zeros(smaller, length, dtype=torch.float64)
    for i in range(smaller):
        centre = (i + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))
        distance = (torch.arange(first, last, dtype=torch.float64) - centre + 0.5).abs() / scale
        matrix[i, first:last] = _bicubic(distance) if filter == "bicubic" else (distance <= 0.5).double()
    return matrix / matrix.sum(1, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2, for x ≥ 0."""
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
