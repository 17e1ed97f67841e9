"""Stored pixels and images in [-1, 1]."""

import numpy as np
import torch

from ddpm_hf.data.pixels import normalize, random_flip, to_uint8


def test_pixels_map_to_plus_minus_one_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = normalize(pixels)
    assert (x[0], x[255]) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)
    deep = torch.from_numpy(np.arange(65536, dtype=np.uint16))
    y = normalize(deep)
    assert (y[0], y[65535]) == (-1, 1)
    assert len(y.unique()) == 65536
    torch.testing.assert_close(y[::257], x, rtol=0, atol=1e-6)


def test_flips_are_mirror_images_of_half_the_batch():
    x = torch.arange(64 * 4.0).reshape(64, 1, 2, 2)
    flipped = random_flip(x)
    is_flipped = (flipped == x.flip(-1)).flatten(1).all(1)
    is_plain = (flipped == x).flatten(1).all(1)
    assert (is_flipped ^ is_plain).all()
    assert 16 < int(is_flipped.sum()) < 48
    torch.manual_seed(0)  # as conftest does before each test
    assert torch.equal(random_flip(x), flipped)
