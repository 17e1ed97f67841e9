"""Which samples copy training images: for sets so small that looking costs next to nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..config.training import TrainConfig
from ..data.dataset import Images
from ..data.pixels import normalize, to_uint8
from ..evaluation.metrics.memorization import nearest_neighbours

MOST_IMAGES = 5000
SIDE = 32  # pixels at which images are compared: larger ones are averaged down, which spares copies
RATIO = 1 / 3


class Copies(NamedTuple):
    """The nearest training image of each of N samples.

    Attributes:
        ratios: the distance to it, divided by that to the second nearest; float64 of shape (N,).
        indices: which one it is, int64 of shape (N,).
    """

    ratios: Tensor
    indices: Tensor

    @property
    def number(self) -> int:
        """How many samples are copies: three times as near to one training image as to any other.

        The criterion of Gu et al. (2023, arXiv 2310.02664), which needs no threshold for distances: a smooth image is
        near to many.
        """
        return int((self.ratios < RATIO).sum())


class TrainingImages:
    """The training images of a run, as far as samples are compared with them.

    Attributes:
        pixels: uint8 of shape (N, C, H, W), each image once.
    """

    def __init__(self, images: Images, config: TrainConfig) -> None:
        pixels = to_uint8(normalize(images.sample(len(images), config.seed)))
        first = {image.numpy().tobytes(): i for i, image in reversed(list(enumerate(pixels)))}
        self.pixels = pixels[sorted(first.values())]
        self.points = _small(self.pixels)
        self.flips = config.random_flip

    def nearest(self, samples: Tensor) -> Copies:
        """Compare samples, uint8 of shape (N, C, H, W), with the training images. All processes must call it.

        With --random_flip, their mirror images are copies, too.
        """
        views = [samples, samples.flip(-1)] if self.flips else [samples]
        found = [nearest_neighbours(_small(view), self.points, 2, show_progress=False) for view in views]
        distances = torch.cat([f.distances for f in found], 1)
        indices = torch.cat([f.indices for f in found], 1)
        first, places = distances.min(1)
        nearest = indices.gather(1, places[:, None])
        second = distances.masked_fill(indices == nearest, torch.inf).min(1).values
        return Copies(first / second, nearest[:, 0])


def open_training_images(images: Images, config: TrainConfig) -> TrainingImages | None:
    """The training images to compare samples with; None for a large set, a stream, and one of fewer than two images."""
    if not images.has_length or len(images) > MOST_IMAGES:
        return None
    known = TrainingImages(images, config)
    return known if len(known.pixels) > 1 else None


def _small(pixels: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    return adaptive_avg_pool2d(pixels.float(), (min(height, SIDE), min(width, SIDE)))
