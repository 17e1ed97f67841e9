"""Copies of training images are counted, and new images are not."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import StoredImages
from ddpm_hf.training.copies import MOST_IMAGES, open_training_images

DIGITS = torch.from_numpy(np.rint(load_digits().images[:, None] * (255 / 16)).astype(np.uint8))
SEEN, NEW = DIGITS[:600], DIGITS[1200:1300]


def opened(pixels, **options):
    return open_training_images(StoredImages(pixels, "digits"), TrainConfig(dataset_name="digits", **options))


def test_noisy_copies_are_found_with_the_image_that_they_copy_and_new_images_are_not():
    known = opened(SEEN)
    noise = torch.randint(-12, 13, (50, 1, 8, 8))
    copies = known.nearest((SEEN[:50].int() + noise).clamp(0, 255).to(torch.uint8))
    assert copies.number >= 49
    assert torch.equal(known.pixels[copies.indices], SEEN[:50])
    assert known.nearest(NEW).number <= 1


def test_mirrored_copies_count_where_images_are_flipped():
    mirrored = SEEN[:50].flip(-1)
    assert opened(SEEN).nearest(mirrored).number < 10
    assert opened(SEEN, random_flip=True).nearest(mirrored).number == 50


def test_images_that_the_training_set_holds_twice_hide_no_copies():
    known = opened(torch.cat([SEEN, SEEN]))
    assert len(known.pixels) == 600
    assert known.nearest(SEEN[:50]).number == 50


def test_large_images_are_compared_in_small():
    large = torch.nn.functional.interpolate(SEEN[:100].float(), scale_factor=8).to(torch.uint8)
    copies = opened(large).nearest(large[:10])
    assert copies.number == 10
    assert torch.equal(copies.ratios, torch.zeros(10, dtype=torch.float64))


def test_large_sets_and_single_images_are_not_looked_at():
    assert opened(torch.zeros(MOST_IMAGES + 1, 1, 1, 1, dtype=torch.uint8)) is None
    assert opened(SEEN[:1].repeat(5, 1, 1, 1)) is None
