"""Features of images without a pre-trained network: the small patches that they consist of, and where these are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate, unfold

from ...data.pixels import normalize
from ...diffusion.ddpm_process import check_integer

PATCH = 5  # pixels
WORDS = 64
MAX_FEATURES = 64
COARSE = 32  # pixels: features of larger images are also taken at this size
LEARNED_FROM = 20_000  # patches
BATCH_SIZE = 64


class PatchFeatures:
    """Features by k-means, after Coates, Ng and Lee (AISTATS 2011), learned from a few hundred real images.

    The words of a vocabulary are the means of clusters of whitened 5×5 patches. A patch activates each word by how much
    closer than the average word it is; activations are averaged over each quarter of the image, and reduced to their
    principal components. Large images contribute two views: at full size and at 32 pixels.

    On digits, clothes and photographs, the Fréchet distance in these features distinguishes blur, noise, missing
    classes and composites of two images from real ones; in features of random convolutions, noisy photographs are as
    good as real ones (training/benchmarks/README.md). It compares models on the same real images only.
    """

    def __init__(self, real: Tensor) -> None:
        """Learn from real images, square and uint8 of shape (N, C, H, W); the result depends on nothing else."""
        check_integer("number of images", len(real), 2)
        generator = torch.Generator().manual_seed(0)
        patches = [[_patches(view) for view in _views(batch)] for batch in real.cpu().split(BATCH_SIZE)]
        self.vocabularies = [_Vocabulary.learn(torch.cat(view), generator) for view in zip(*patches, strict=True)]
        activations = self._activations(real)
        self.mean = activations.mean(0)
        count = min(MAX_FEATURES, max(1, len(real) // 4))  # N images determine no more of a covariance
        self.components = torch.linalg.eigh(torch.cov((activations - self.mean).T)).eigenvectors[:, -count:]

    def __call__(self, images: Tensor) -> Tensor:
        """The features of uint8 images (N, C, H, W): float32 (N, D) on the CPU.

        D is a quarter of the number of images that they were learned from, at most 64.
        """
        return (self._activations(images) - self.mean) @ self.components

    def _activations(self, images: Tensor) -> Tensor:
        return torch.cat([self._activations_of_batch(batch) for batch in images.cpu().split(BATCH_SIZE)])

    def _activations_of_batch(self, images: Tensor) -> Tensor:
        views = zip(_views(images), self.vocabularies, strict=True)
        return torch.cat([vocabulary.activations(view) for view, vocabulary in views], 1)


@dataclass(frozen=True)
class _Vocabulary:
    mean: Tensor  # (P,) of all patches
    whitening: Tensor  # (P, P)
    words: Tensor  # (W, P), whitened

    @classmethod
    def learn(cls, patches: Tensor, generator: torch.Generator) -> Self:
        """From patches of several images, (N, L, P)."""
        patches = patches.flatten(0, 1)
        patches = patches[torch.randperm(len(patches), generator=generator)[:LEARNED_FROM]]
        variances, axes = torch.linalg.eigh(torch.cov(patches.T))
        scale = (variances.clamp(min=0) + 0.1 * variances.mean() + 1e-6).rsqrt()
        mean, whitening = patches.mean(0), (axes * scale) @ axes.T
        return cls(mean, whitening, _k_means((patches - mean) @ whitening))

    def activations(self, view: Tensor) -> Tensor:
        """How much of each word there is in each quarter of images in [-1, 1], (N, 4 W)."""
        patches = _patches(view)
        distances = torch.cdist((patches - self.mean) @ self.whitening, self.words.expand(len(patches), -1, -1))
        activations = (distances.mean(2, keepdim=True) - distances).clamp(min=0)
        side = round(activations.shape[1] ** 0.5)
        return adaptive_avg_pool2d(activations.mT.unflatten(2, (side, side)), 2).flatten(1)


def _views(images: Tensor) -> list[Tensor]:
    """The images in [-1, 1], and a smaller version if they are large."""
    x = normalize(images)
    if x.shape[-1] <= COARSE:
        return [x]
    return [x, interpolate(x, size=(COARSE, COARSE), mode="bilinear", antialias=True)]


def _patches(view: Tensor) -> Tensor:
    """Patches of each image, (N, L, P), at no more than about 32 × 32 places."""
    return unfold(view, PATCH, padding=PATCH // 2, stride=max(1, view.shape[-1] // COARSE)).mT


def _k_means(points: Tensor) -> Tensor:
    """Ten iterations of Lloyd's algorithm from the first points, which are in random order.

    Not scikit-learn's: its means depend on the number of threads, and so features would differ between processes.
    """
    means = points[:WORDS]
    for _ in range(10):
        nearest = torch.cdist(points, means).argmin(1)
        sums = torch.zeros_like(means).index_add_(0, nearest, points)
        counts = torch.bincount(nearest, minlength=len(means))[:, None]
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return means
