"""Hashes of weights."""

import torch

from ddpm_hf.storage.weights import hash_weights


def test_different_weights_have_different_hashes(make_unet):
    network = make_unet()
    digest = hash_weights(network)
    assert digest == hash_weights(make_unet())
    assert digest != hash_weights(make_unet().bfloat16())
    with torch.no_grad():
        network.conv_out.bias[-1] += 1e-7
    assert digest != hash_weights(network)
