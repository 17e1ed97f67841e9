"""The network of a run, its optimizer and its moving average."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.network import build_unet, ema_weights
from support.runs import TINY_OPTIONS


def test_zero_init_starts_with_an_output_of_0_and_residual_blocks_that_do_nothing():
    unet = build_unet(TrainConfig(**TINY_OPTIONS, zero_init=True))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    assert (unet(x, t).sample == 0).all()
    with torch.no_grad():
        middle = torch.randn(2, unet.config.block_out_channels[-1], 4, 4)
        assert torch.equal(unet.mid_block(middle, torch.randn(2, unet.time_embedding.linear_2.out_features)), middle)
        unet.conv_out.weight.normal_()
    unet(x, t).sample.square().mean().backward()
    assert all(block.conv2.weight.grad.abs().sum() > 0 for block in unet.mid_block.resnets)  # it can learn
    assert not (build_unet(TrainConfig(**TINY_OPTIONS))(x, t).sample == 0).any()


def test_ema_weights_are_swapped_back_whatever_happens(make_unet):
    unet = make_unet()
    ema = EMAModel(unet.parameters(), decay=0.5)
    before = [p.clone() for p in unet.parameters()]
    for shadow in ema.shadow_params:
        shadow.zero_()

    def interrupted():
        with ema_weights(ema, unet):
            assert all((p == 0).all() for p in unet.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
