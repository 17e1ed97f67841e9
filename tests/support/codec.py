"""Images to compress."""

import torch


def smooth_images(count, channels=1, size=8, seed=0):
    """uint8 (N, C, H, W): blobs."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(count, channels, 3, 3, generator=g)
    large = torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear", align_corners=True)
    return (large * 255).to(torch.uint8)
