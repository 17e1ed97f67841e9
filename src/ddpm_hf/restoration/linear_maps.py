"""Linear maps of images of one shape, with what restoring an image needs of them.

A `LinearMap` has its adjoint and (A Aᵀ + ρ I)⁻¹, of which the pseudo-inverse A⁺ y = Aᵀ (A Aᵀ)⁺ y is the case ρ = 0.
Maps whose eigenvalues of A Aᵀ are known apply any function of them (`spectral`); all others solve by conjugate
gradients.

Images are (B, C, H, W), floating point.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CG_ITERATIONS = 200  # a fixed number, so that nothing waits for the device; converged ones change nothing any more


class LinearMap(ABC):
    """A linear map of images of one shape, on one device and in one precision.

    Args:
        image_shape: (C, H, W) of x.
        measurement_shape: that of y, without the batch.
    """

    def __init__(self, image_shape: Sequence[int], measurement_shape: Sequence[int]) -> None:
        self.image_shape, self.measurement_shape = tuple(image_shape), tuple(measurement_shape)

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x, of shape (B, *measurement_shape)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, of shape (B, C, H, W)."""

    @abstractmethod
    def solve(self, y: Tensor, ridge: float | Tensor) -> Tensor:
        """(A Aᵀ + ridge I)⁻¹ y, of the shape of y; ridge is a number or (B, 1, 1, 1).

        For the number 0 it is the pseudo-inverse of A Aᵀ.
        """

    def pinv(self, y: Tensor) -> Tensor:
        """A⁺ y = Aᵀ (A Aᵀ)⁺ y, of shape (B, C, H, W): the smallest x of those that explain y best."""
        return self.adjoint(self.solve(y, 0.0))


class SpectralMap(LinearMap):
    """A map whose A Aᵀ = Q Λ Qᵀ is known."""

    @abstractmethod
    def spectral(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Q f(Λ) Qᵀ y. `function` maps eigenvalues of A Aᵀ, exactly 0 where A Aᵀ is singular, to factors."""

    def solve(self, y: Tensor, ridge: float | Tensor) -> Tensor:
        """(A Aᵀ + ridge I)⁻¹ y."""
        if isinstance(ridge, Tensor) or ridge > 0:
            return self.spectral(y, lambda e: 1 / (e + ridge))
        return self.spectral(y, lambda e: torch.where(e > 0, 1 / e.where(e > 0, 1), 0))


class SeparableMap(SpectralMap):
    """A = channels ⊗ rows ⊗ columns: a matrix for each axis of the image.

    Args:
        channels, rows, columns: float64 of shape (C', C), (H', H), (W', W).
    """

    def __init__(
        self, channels: Tensor, rows: Tensor, columns: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        matrices = (channels, rows, columns)
        super().__init__([m.shape[1] for m in matrices], [m.shape[0] for m in matrices])
        self.exact = matrices
        self.matrices = [m.to(device, dtype) for m in matrices]
        values, vectors = zip(*(torch.linalg.eigh(m @ m.T) for m in matrices), strict=True)
        eigenvalues = torch.einsum("c,h,w->chw", *values)
        smallest = torch.finfo(dtype).eps * max(max(m.shape) for m in matrices) * float(eigenvalues.max())
        self.eigenvalues = eigenvalues.where(eigenvalues > smallest, 0).to(device, dtype)
        self.vectors = [v.to(device, dtype) for v in vectors]

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        return _on_each_axis(x, self.matrices)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return _on_each_axis(y, [m.T for m in self.matrices])

    def spectral(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Q f(Λ) Qᵀ y."""
        rotated = _on_each_axis(y, [v.T for v in self.vectors])
        return _on_each_axis(function(self.eigenvalues) * rotated, self.vectors)


def _on_each_axis(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    channels, rows, columns = matrices
    return torch.einsum("dc,bchw->bdhw", channels, rows @ x @ columns.T)


class MaskMap(SpectralMap):
    """A = diag(mask): y holds the image where the mask is 1, and 0 elsewhere. A mask for each image is possible."""

    def __init__(self, mask: Tensor, image_shape: Sequence[int]) -> None:
        super().__init__(image_shape, image_shape)
        self.mask = mask

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        return self.mask * x

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self.mask * y

    def spectral(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Q f(Λ) Qᵀ y."""
        return function(self.mask) * y


class ConvolutionMap(SpectralMap):
    """Convolution with a kernel at periodic boundaries, the same for every channel: diagonal in Fourier space."""

    def __init__(self, kernel: Tensor, image_shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(image_shape, image_shape)
        height, width = image_shape[-2:]
        padded = torch.zeros(height, width, dtype=torch.float64)
        padded[: kernel.shape[0], : kernel.shape[1]] = kernel
        centred = padded.roll((-(kernel.shape[0] // 2), -(kernel.shape[1] // 2)), (0, 1))
        transfer = torch.fft.rfft2(centred)
        self.size = (height, width)
        self.transfer = transfer.to(device, torch.complex128 if dtype == torch.float64 else torch.complex64)
        eigenvalues = transfer.abs().square()
        smallest = torch.finfo(dtype).eps * max(height, width) * float(eigenvalues.max())
        self.eigenvalues = eigenvalues.where(eigenvalues > smallest, 0).to(device, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        return self._multiply(x, self.transfer)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self._multiply(y, self.transfer.conj())

    def spectral(self, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Q f(Λ) Qᵀ y."""
        return self._multiply(y, function(self.eigenvalues))

    def _multiply(self, x: Tensor, factors: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * factors, s=self.size)


class IterativeMap(LinearMap):
    """Any linear map with its adjoint; equations in A Aᵀ are solved by conjugate gradients."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        image_shape: Sequence[int],
        measurement_shape: Sequence[int],
    ) -> None:
        super().__init__(image_shape, measurement_shape)
        self._forward, self._adjoint = forward, adjoint

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        return self._forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y."""
        return self._adjoint(y)

    def solve(self, y: Tensor, ridge: float | Tensor) -> Tensor:
        """(A Aᵀ + ridge I)⁻¹ y."""

        # Hestenes and Stiefel (1952). In the range of A Aᵀ, where all residuals stay but for rounding, it finds the
        # pseudo-inverse; what rounding leaves outside may grow, so the iterate of the smallest residual is returned.
        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))

        if isinstance(ridge, Tensor):
            ridge = ridge.reshape(-1, *(1,) * (y.ndim - 1))
        solution = best = torch.zeros_like(y)
        residual = direction = y
        energy = least = dot(y, y)
        smallest = energy * torch.finfo(y.dtype).eps ** 2
        for _ in range(min(CG_ITERATIONS, 2 * math.prod(self.measurement_shape))):
            image = self(self.adjoint(direction)) + ridge * direction
            curvature = dot(direction, image)
            is_done = (energy <= smallest) | (curvature <= 0)
            step = torch.where(is_done, 0, energy / curvature.where(~is_done, 1))
            solution = solution + step * direction
            residual = residual - step * image
            renewed = dot(residual, residual)
            direction = residual + torch.where(is_done, 0, renewed / energy.where(~is_done, 1)) * direction
            energy = torch.where(is_done, energy, renewed)
            best, least = torch.where(energy < least, solution, best), torch.minimum(energy, least)
        return best
