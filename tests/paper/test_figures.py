"""Single figures tell the truth: chain and closed form agree in law; the drawn network is the network."""

import pytest
import torch

from ddpm_hf import DDPMProcess
from ddpm_hf.diffusion.ddpm_process import make_betas
from ddpm_hf.paper.forward import both_ways, largest_deviation
from ddpm_hf.paper.network import read_blocks
from support.models import tiny_unet

DRAWS = 40_000
TIMES = [0, 10, 25, 49]


def test_chain_and_closed_form_are_equal_in_law():
    process = DDPMProcess(make_betas("linear", 50, 1e-3, 0.2))
    found = both_ways(process, 0.8, TIMES, DRAWS, seed=0)
    assert largest_deviation(process, 0.8, found, DRAWS) < 4


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_chain_of_other_betas_is_found_out(factor):
    process = DDPMProcess(make_betas("linear", 50, 1e-3, 0.2))
    found = both_ways(DDPMProcess(process.betas * factor), 0.8, TIMES, DRAWS, seed=0)
    assert largest_deviation(process, 0.8, found, DRAWS) > 5


def test_the_drawing_has_every_block_and_nearly_every_parameter_of_the_network():
    unet = tiny_unet(channels=3, sample_size=16)
    blocks = read_blocks(unet, (3, 16, 16))
    assert [b.name for b in blocks] == [
        "conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1", "conv_out",
    ]  # fmt: skip
    assert [b.shape for b in blocks] == [
        (4, 16, 16), (4, 8, 8), (8, 8, 8), (8, 8, 8), (8, 16, 16), (4, 16, 16), (3, 16, 16),
    ]  # fmt: skip
    others = [unet.time_embedding, unet.conv_norm_out]
    total = sum(b.parameters for b in blocks) + sum(p.numel() for module in others for p in module.parameters())
    assert total == sum(p.numel() for p in unet.parameters())
    assert not any(module._forward_hooks for module in unet.modules())  # none stays behind


def test_time_embeddings_of_equal_distances_have_equal_dot_products():
    embedding = tiny_unet().time_proj(torch.arange(200)).double()
    products = embedding @ embedding.T
    assert torch.allclose(products[3:, 3:], products[:-3, :-3], atol=1e-4)
    assert (products.diagonal() > products - torch.eye(200) * 1e9).all()
