"""The network of a run, its optimizer and its moving average."""

import pytest
import torch
from diffusers.training_utils import EMAModel

from ddpm_hf.training.network import ema_weights


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
