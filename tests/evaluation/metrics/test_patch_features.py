"""Patch features: which flaws of images they detect."""

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.evaluation.metrics.distances import frechet_distance, moments
from ddpm_hf.evaluation.metrics.patch_features import PatchFeatures


@pytest.fixture(scope="module")
def digits():
    images = load_images(TrainConfig(dataset_name="digits", resolution=16, channels=1, label_column="label"))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return images.pixels[order], images.labels[order]


def test_the_distance_distinguishes_flaws_of_bad_models_from_real_images(digits):
    pixels, labels = digits
    validation_set, real, others = pixels[:256], pixels[256:512], pixels[512:]
    features = PatchFeatures(validation_set)
    reference = moments(features(validation_set))

    def distance(images):
        return frechet_distance(moments(features(images)), reference)

    def noisy(scale):
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
        return (real + scale * noise).round().clamp(0, 255).to(torch.uint8)

    floor = max(distance(images) for images in (real, *others.split(256)[:4]))
    by_noise = [distance(noisy(scale)) for scale in (8, 16, 32, 64)]
    assert [distance(real), *by_noise] == sorted([distance(real), *by_noise])
    assert by_noise[1] > 2 * floor
    halves = torch.cat([real[:, :, :8], real.roll(1, 0)[:, :, 8:]], dim=2)
    blurred = avg_pool2d(real.float(), 3, 1, 1).round().to(torch.uint8)
    few_classes = others[labels[512:] < 5][:256]
    one_image = real[:1].expand(256, -1, -1, -1)
    for worse in (halves, blurred, few_classes, real.flip(3), one_image):
        assert distance(worse) > 2 * floor


def test_features_depend_on_the_images_alone_in_every_size_and_mode():
    for shape in ((4, 1, 8, 8), (16, 3, 40, 40), (20, 2, 16, 16)):
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        one, two = PatchFeatures(images), PatchFeatures(images)
        assert torch.equal(one(images), two(images))
        assert one(images).shape == (shape[0], max(1, shape[0] // 4))
        torch.testing.assert_close(one(images[:3]), one(images)[:3], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="number of images"):
        PatchFeatures(images[:1])
