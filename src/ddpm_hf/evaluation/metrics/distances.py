"""Distances between two sets of features, which measure the quality of samples: torch only, in float64.

Features are tensors of shape (N, D), one row per image, of any floating type, on the CPU; N images and M of reference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1000  # at a time, which bounds the memory


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of a set that the Fréchet distance needs: float64 `mean` (D,), `covariance` (D, D), and its size."""

    mean: Tensor
    covariance: Tensor
    num_images: int

    @cached_property
    def root(self) -> Tensor:
        """R with R Rᵀ = Σ; eigenvalues that are zero up to rounding are set to zero."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * torch.where(values > _rounding(values), values, 0.0).sqrt()


class Estimate(NamedTuple):
    """A value and its standard error, over other samples of the same sizes from the same two distributions."""

    value: float
    standard_error: float


class FrechetEstimate(NamedTuple):
    """The distance, its standard error as in `Estimate`, and its finite-sample bias, the excess over N → ∞."""

    value: float
    standard_error: float
    bias: float


def moments(features: Tensor) -> Moments:
    """Mean and unbiased covariance of features (N, D).

    Raises:
        ValueError: for fewer than two rows, and for NaN or infinity among them.
    """
    _check(features, 2)
    mean = features.mean(0, dtype=torch.float64)
    scatter = mean.new_zeros(len(mean), len(mean))
    for rows in features.split(ROWS):
        centred = rows.double() - mean
        scatter.addmm_(centred.mT, centred)
    return Moments(mean, scatter / (len(features) - 1), len(features))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet (2-Wasserstein) distance of two Gaussians, d² (Heusel et al. 2017, arXiv 1706.08500, Eq. 6).

    d² = ‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½). With Σ = R Rᵀ, the trace of (Σ_a Σ_b)^½ is the sum of the
    singular values of R_aᵀ R_b, which are real even without full rank. Equal moments give exactly 0.
    """
    return _distance(a, b, torch.linalg.svdvals(a.root.mT @ b.root))


def frechet_estimate(features: Tensor, reference_features: Tensor, reference: Moments) -> FrechetEstimate:
    """The Fréchet distance of a set of features to a reference, its standard error and its bias.

    The distance is differentiable in means and covariances, so that its deviation is, to first order, a mean over
    images of ψ(x) = 2 (μ_a - μ_b)ᵀ(x - μ_a) + (x - μ_a)ᵀ(1 - T)(x - μ_a), where T is the optimal map from the Gaussian
    of x to the other one; and likewise over the reference (Rippl, Munk, Sturm 2016, arXiv 1602.04064). The standard
    error is that of these means. A bootstrap fails: repeated images reduce the rank of a covariance, which adds the
    bias a second time.

    The bias falls as 1/N (Chong, Forsyth 2020, arXiv 1911.07023), so that half of the images have twice the bias: it is
    the mean distance of the two halves minus the distance of all images.

    Args:
        features: (N, D), N at least 4.
        reference_features: (M, D), those of `reference`, or a representative part of them.
        reference: moments of the reference.
    """
    own = moments(features)
    U, overlaps, Vh = torch.linalg.svd(own.root.mT @ reference.root)
    value = _distance(own, reference, overlaps)

    U, V = own.root @ U, reference.root @ Vh.mT
    inverse = torch.where(overlaps > _rounding(overlaps), 1 / overlaps, 0.0)
    there, back = (V * inverse) @ V.mT, (U * inverse) @ U.mT  # T of either side
    variance = _variance_of_mean(features, own, reference, there)
    variance += _variance_of_mean(reference_features, reference, own, back)

    halves = [frechet_distance(moments(half), reference) for half in features.tensor_split(2)]
    return FrechetEstimate(value, math.sqrt(variance), sum(halves) / 2 - value)


def kernel_distance(a: Tensor, b: Tensor) -> Estimate:
    """The squared maximum mean discrepancy with the kernel k(x, y) = (xᵀy/D + 1)³, without bias.

    Bińkowski et al. 2018 (arXiv 1801.01401, Section 3.1), over all pairs of images instead of subsets. The standard
    error is that of the jackknife that leaves out one image at a time. Time grows as (N + M)².
    """
    _check(a, 3)
    _check(b, 3)
    n, m = len(a), len(b)
    within_a, within_b, between_a, between_b = (a.new_zeros(k, dtype=torch.float64) for k in (n, m, n, m))
    for i in range(0, n, ROWS):
        within_a[i : i + ROWS] = _kernel(a[i : i + ROWS], a).sum(1)
        k = _kernel(a[i : i + ROWS], b)
        between_a[i : i + ROWS] = k.sum(1)
        between_b += k.sum(0)
    for i in range(0, m, ROWS):
        within_b[i : i + ROWS] = _kernel(b[i : i + ROWS], b).sum(1)
    within_a -= _kernel_with_itself(a)
    within_b -= _kernel_with_itself(b)

    total_a, total_b, total = within_a.sum(), within_b.sum(), between_a.sum()
    value = total_a / (n * (n - 1)) + total_b / (m * (m - 1)) - 2 * total / (n * m)
    # Up to a constant, the value without image i of one set.
    without_a = (total_a - 2 * within_a) / ((n - 1) * (n - 2)) - 2 * (total - between_a) / ((n - 1) * m)
    without_b = (total_b - 2 * within_b) / ((m - 1) * (m - 2)) - 2 * (total - between_b) / (n * (m - 1))
    variance = without_a.var(correction=0) * (n - 1) + without_b.var(correction=0) * (m - 1)
    return Estimate(float(value), math.sqrt(variance))


def precision_recall(features: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of images within the manifold of the reference, and of the reference within that of the images.

    Within the manifold of a set: no farther from some member than the latter's k-th neighbour in the set (Kynkäänniemi
    et al. 2019, arXiv 1904.06991, Eq. 1-2). In float32, as in other implementations. Both depend on N and M.

    Raises:
        ValueError: for a set of fewer than k + 1.
    """
    _check(features, k + 1)
    _check(reference, k + 1)
    features, reference = features.float(), reference.float()
    return _share_within(features, reference, k), _share_within(reference, features, k)


def _share_within(points: Tensor, manifold: Tensor, k: int) -> float:
    # The nearest to a member is the member itself.
    radii = torch.cat([torch.cdist(rows, manifold).kthvalue(k + 1).values for rows in manifold.split(ROWS)])
    inside = [(torch.cdist(rows, manifold) <= radii).any(1) for rows in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())


def _distance(a: Moments, b: Moments, overlaps: Tensor) -> float:
    if torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance):
        return 0.0
    spread = a.covariance.trace() + b.covariance.trace() - 2 * overlaps.sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def _rounding(spectrum: Tensor) -> Tensor:
    """The values of a spectrum below it are zero up to the rounding of float64."""
    return len(spectrum) * torch.finfo(spectrum.dtype).eps * spectrum.max()


def _variance_of_mean(features: Tensor, own: Moments, other: Moments, transport: Tensor) -> float:
    """The variance of the mean of the influences of these images."""
    bend = torch.eye(len(transport), dtype=torch.float64) - transport
    influences = []
    for rows in features.split(ROWS):
        x = rows.double() - own.mean
        influences.append(2 * x @ (own.mean - other.mean) + ((x @ bend) * x).sum(1))
    return float(torch.cat(influences).var()) / len(features)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double().mT / x.shape[1] + 1) ** 3


def _kernel_with_itself(x: Tensor) -> Tensor:
    return (x.double().square().mean(1) + 1) ** 3


def _check(features: Tensor, at_least: int) -> None:
    if len(features) < at_least:
        raise ValueError(f"there are {len(features)} images, but this needs at least {at_least}: use more of them.")
    if not features.isfinite().all():
        raise ValueError("features hold NaN or infinity: the network that extracts them is damaged.")
