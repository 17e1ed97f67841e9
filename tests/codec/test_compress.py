"""Round trips: what comes out is what went in, or an error."""

import numpy as np
import torch

from ddpm_hf import compress, decompress
from ddpm_hf.codec.compress import encode, gather
from support.codec import smooth_images


def as_tensor(images):
    return torch.stack([torch.from_numpy(np.array(image)) for image in images])


def test_images_come_back_bit_by_bit(pipeline):
    images = smooth_images(21)
    data = compress(pipeline, images, num_inference_steps=5, batch_size=4)
    assert torch.equal(as_tensor(decompress(pipeline, data)), images[:, 0])


def test_a_few_images_are_not_larger_than_their_png(pipeline):
    """There is nothing for the first latents to borrow from: the images are stored in PNG or WebP."""
    image = smooth_images(1)
    result = encode(pipeline, gather(image, pipeline))
    assert (result.report.coded, result.report.opening) == (0, 1)
    assert torch.equal(as_tensor(decompress(pipeline, result.data)), image[:, 0])
