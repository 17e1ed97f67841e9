"""Tiles: they cover an image, agree where they overlap, and leave a restoration as it is where they may."""

import itertools

import pytest
import torch

from ddpm_hf.restoration.operators import Inpaint
from ddpm_hf.restoration.restore import restore
from ddpm_hf.restoration.tiles import predict_in_tiles, tile_corners, tile_starts
from support.oracle import oracle_pipeline


@pytest.mark.parametrize(("length", "tile"), [(16, 16), (17, 16), (28, 16), (29, 16), (100, 16), (9, 3), (1000, 64)])
def test_tiles_cover_a_line_and_overlap(length, tile):
    starts = tile_starts(length, tile)
    assert starts[0] == 0
    assert starts[-1] + tile == length
    overlaps = [a + tile - b for a, b in itertools.pairwise(starts)]
    assert all(overlap >= tile // 4 - 1 for overlap in overlaps)
    assert len(starts) <= 2 + length / (tile - tile // 4)  # and no more of them than that takes


def test_a_prediction_that_looks_at_pixels_alone_is_that_of_the_whole_image():
    x = torch.randn(3, 2, 23, 50)
    seen = []

    def predict(tiles, labels):
        seen.append(len(tiles))
        return torch.cat([tiles * 2 + labels.reshape(-1, 1, 1, 1), tiles], dim=1)

    labels = torch.tensor([5, 0, 7])
    whole = torch.cat([x * 2 + labels.reshape(-1, 1, 1, 1), x], dim=1)
    torch.testing.assert_close(predict_in_tiles(predict, x, labels, (8, 16)), whole)
    assert sum(seen) == 3 * len(tile_corners((23, 50), (8, 16)))
    assert max(seen) <= 64


def test_where_tiles_overlap_they_are_averaged_with_less_weight_at_their_borders():
    sides = iter([0.0, 1.0])

    def predict(tiles, labels):
        return torch.cat([torch.full_like(tile, next(sides)) for tile in tiles.split(1)])

    row = predict_in_tiles(predict, torch.zeros(1, 1, 8, 14), None, (8, 8))[0, 0, 0]
    assert (row[:6] == 0).all()
    assert (row[8:] == 1).all()
    torch.testing.assert_close(row[6:8], torch.tensor([1 / 3, 2 / 3]))


@pytest.mark.parametrize("method", ["mmps", "ddnm"])
def test_a_restoration_in_tiles_is_that_of_a_network_of_the_size(method):
    """For a network that looks at pixels alone: also its gradients go through the tiles."""
    size = (20, 12)
    mask = torch.rand(size, generator=torch.Generator().manual_seed(0)) > 0.5
    y = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1))
    options = {"num_inference_steps": 5, "method": method, "output_type": "latent"}
    seeds = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    whole = restore(oracle_pipeline(0.3, size=size), y, Inpaint(mask), generator=seeds[0], **options).images
    tiled = restore(oracle_pipeline(0.3), y, Inpaint(mask), generator=seeds[1], size=size, **options).images
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["mmps", "ddnm"])
def test_only_tiles_that_see_a_hole_are_denoised(method):
    """And the hole is painted as if all were; what is known elsewhere stays as it is."""
    size, known = (20, 32), torch.ones(20, 32)
    known[2:5, 3:5] = 0  # in one of the tiles of 8×8
    y = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1)) * known
    options = {"num_inference_steps": 5, "method": method}
    whole = restore(
        oracle_pipeline(0.3, size=size), y, Inpaint(known), generator=torch.Generator().manual_seed(2), **options
    ).images  # fmt: skip
    pipe, seen = oracle_pipeline(0.3), []
    pipe.unet.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    parts = restore(pipe, y, Inpaint(known), generator=torch.Generator().manual_seed(2), size=size, **options).images
    assert seen == [1] * 5
    assert len(tile_corners(size, (8, 8))) == 15
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_images_smaller_than_a_tile_and_latents_of_another_size_are_refused():
    pipe, y = oracle_pipeline(0.3), torch.rand(1, 1, 4, 12)
    with pytest.raises(ValueError, match="`size` is 4, but must be an integer of at least 8"):
        restore(pipe, y, Inpaint(torch.ones(4, 12)), size=(4, 12))
    with pytest.raises(ValueError, match=r"`latents` have shape \(1, 1, 8, 8\), but must have \(1, 1, 8, 12\)"):
        restore(
            pipe, torch.rand(1, 1, 8, 12), Inpaint(torch.ones(8, 12)), size=(8, 12), latents=torch.zeros(1, 1, 8, 8)
        )
