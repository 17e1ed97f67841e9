"""Random images, and a feature extractor in closed form."""

import torch

from ddpm_hf.evaluation.metrics.features import Extractor


def images(count, channels=3, seed=0, size=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=g)


def linear_extractor(dim=6, name="linear"):
    """A network whose features are known: a fixed linear map of the pixels."""
    weights = torch.randn(3 * 64, dim, generator=torch.Generator().manual_seed(dim)) / 64
    return Extractor(name, dim, lambda x: x.flatten(1).float() @ weights)
