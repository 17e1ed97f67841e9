"""What `recipes.py` measures of trained models and of peers' samples."""

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.evaluation.likelihood import bits_per_dim
from ddpm_hf.evaluation.metrics.distances import frechet_estimate, moments
from ddpm_hf.evaluation.metrics.features import open_extractor
from ddpm_hf.evaluation.metrics.memorization import memorization, nearest_neighbours
from ddpm_hf.sampling.generate import sample_pixels

LIKELIHOOD_CALLS, LIKELIHOOD_IMAGES = 17, 128
REFERENCE = 4000  # training images that samples are compared with, at most


def read_pixels(folder: Path) -> Tensor:
    """All PNGs of a folder and its sub-folders, uint8 (N, C, H, W), in the order of their names."""
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    return torch.from_numpy(pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2))


def sample(pipeline: DDPMPipelineCustom, num_images: int, steps: int) -> Tensor:
    """Samples of seeds 0, 1, … by second-order steps without noise; uint8 (N, C, H, W)."""
    made = sample_pixels(
        pipeline, num_images, 0, 64,
        show_progress=False, num_inference_steps=steps, eta=0.0, solver_order=2, timesteps="linspace",
    )  # fmt: skip
    return torch.cat([pixels for _, pixels in made])


def likelihood(pipeline: DDPMPipelineCustom, held_out: Tensor) -> dict[str, float]:
    """An estimate of the bound of held-out images with σ² = β, in bits/dim."""
    bits = bits_per_dim(
        pipeline, held_out, variance_type="fixed_large", calls_per_image=LIKELIHOOD_CALLS,
        num_images=min(LIKELIHOOD_IMAGES, len(held_out)), show_progress=False,
    )  # fmt: skip
    return {"bits_per_dim": round(bits.total, 3), "bits_per_dim_error": round(bits.standard_error, 3)}


def compare(samples: Tensor, data: Path, extractor: Path) -> dict[str, float]:
    """The Fréchet distance of samples to the training images with its standard error, and the share of copies.

    Copies are samples that lie nearer to a training image than 95 % of the held-out images do: 5 % is what a model
    has that draws new images.
    """
    real = read_real(data, str(extractor))
    features = open_extractor(str(extractor))(samples, show_progress=False).pooled
    distance = frechet_estimate(features, real.features, moments(real.features))
    near = nearest_neighbours(samples, real.train, 1, show_progress=False).distances[:, 0]
    return {
        "frechet": round(distance.value, 3),
        "frechet_error": round(distance.standard_error, 3),
        "copies": round(memorization(near, real.distances).share, 3),
    }


class Real(NamedTuple):
    """What samples are compared with."""

    train: Tensor
    features: Tensor  # of the first REFERENCE of them
    distances: Tensor  # of the held-out images to the nearest of them


@lru_cache
def read_real(data: Path, extractor: str) -> Real:
    """The images of a set, and what is measured of them once."""
    train, held_out = read_pixels(data / "train"), read_pixels(data / "held_out")
    features = open_extractor(extractor)(train[:REFERENCE], show_progress=False).pooled
    return Real(train, features, nearest_neighbours(held_out, train, 1, show_progress=False).distances[:, 0])


def save_grid(samples: Tensor, file: Path) -> None:
    """The first samples as one picture, 16 in a row, enlarged to 64 pixels each."""
    rows = math.ceil(min(64, len(samples)) / 16)
    images = samples[: 16 * rows].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    grid: Any = np.concatenate([np.concatenate(list(images[16 * r : 16 * (r + 1)]), axis=1) for r in range(rows)])
    scale = 64 // images.shape[1]
    Image.fromarray(grid.repeat(scale, 0).repeat(scale, 1)).save(file)
