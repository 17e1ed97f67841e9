"""Nearest training images: exact, and a test that detects memorization."""

import pytest
import torch

from ddpm_hf.evaluation.metrics import memorization as module
from ddpm_hf.evaluation.metrics.memorization import memorization, nearest_neighbours
from ddpm_hf.evaluation.plots import save_neighbours

QUIET = {"show_progress": False}


def photographs(number, seed):
    """Smooth random pictures with 256 levels, uint8 (N, 3, 8, 8)."""
    noise = torch.randn(number, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(noise, size=8, mode="bilinear")
    return (smooth * 50 + 128).round().clamp(0, 255).to(torch.uint8)


def test_neighbours_are_those_of_a_loop_over_all_pairs(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 7)  # so that 20 points are several blocks
    queries, points = photographs(20, 0), photographs(31, 1)
    points[17] = queries[3]
    found = nearest_neighbours(queries, points, 3, **QUIET)
    for i, query in enumerate(queries.long()):
        squares = (points.long() - query).square().flatten(1).sum(1)
        expected = squares.sort().values[:3]
        assert torch.equal(found.distances[i].square().round().long(), expected)
        assert torch.equal(squares[found.indices[i]], expected)
    assert found.distances[3, 0] == 0
    assert found.indices[3, 0] == 17


def test_sums_beyond_float32_are_exact():
    """Large, nearly equal images: float32 would find a distance of 0 or the wrong neighbour."""
    points = torch.full((3, 3, 64, 64), 250, dtype=torch.uint8)
    points[0, 0, 0, 0], points[1, 0, 0, :2] = 251, 251
    found = nearest_neighbours(points[2:], points[:2], 2, **QUIET)
    assert found.distances.tolist() == [[1.0, 2**0.5]]


def test_an_image_is_not_its_own_neighbour_but_its_copy_is(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)
    images = photographs(10, 0)
    images[8] = images[2]
    found = nearest_neighbours(images, images, 1, exclude=torch.arange(10), **QUIET)
    assert (found.indices[:, 0] != torch.arange(10)).all()
    assert found.indices[[2, 8], 0].tolist() == [8, 2]
    assert found.distances[[2, 8], 0].tolist() == [0, 0]


def test_a_model_that_memorizes_is_distinguished_from_one_that_does_not():
    train, held_out, new = photographs(400, 0), photographs(300, 1), photographs(500, 2)
    copies = train[torch.randint(400, (500,))].int() + torch.randint(-6, 7, (500, 3, 8, 8))

    def share(samples, unseen=held_out):
        to_train = nearest_neighbours(samples, train, 1, **QUIET)
        if unseen is None:
            known = nearest_neighbours(train, train, 1, exclude=torch.arange(400), **QUIET)
        else:
            known = nearest_neighbours(unseen, train, 1, **QUIET)
        return memorization(to_train.distances[:, 0], known.distances[:, 0])

    for unseen in (held_out, None):
        good = share(new, unseen)
        assert abs(good.share - 0.05) < 4 * good.standard_error
        assert good.standard_error < 0.025
        assert share(copies.clamp(0, 255).to(torch.uint8), unseen).share == 1
    half = torch.cat([new[:250], train[:250]])
    assert abs(share(half).share - 0.525) < 0.05
    assert share(torch.randint(256, (100, 3, 8, 8), dtype=torch.uint8)).share == 0


def test_the_standard_error_covers_the_truth():
    """Distances that are all from one distribution: the share is 5 %, give or take what is stated."""
    found = [memorization(torch.rand(200), torch.rand(300)) for _ in range(400)]
    within = [abs(f.share - 0.05) < 2 * f.standard_error for f in found]
    assert 0.92 < sum(within) / 400 < 0.99


def test_copies_are_found_although_the_data_contains_copies_itself():
    """A tenth of the held-out images are in the training set: nothing is nearer than that, but as near."""
    held_out = torch.cat([torch.zeros(30), torch.rand(270) + 1])
    copier = memorization(torch.zeros(50), held_out)
    assert (copier.share, copier.threshold, copier.expected) == (1, 0, pytest.approx(0.1))
    assert memorization(torch.ones(50), held_out).share == 0
    assert memorization(torch.ones(50), held_out + 1).expected == 0.05


def test_copies_are_found_in_features_too():
    """Long vectors of float32, and the same from a batch of another size, which rounds otherwise."""
    features = torch.randn(40, 2048) * 30
    rounded = features * (1 + 1e-7 * torch.randn(40, 2048))
    found = nearest_neighbours(torch.cat([features, rounded, features + 1e-3]), features, 1, **QUIET).distances[:, 0]
    assert (found[:80] == 0).all()
    assert found[80:].tolist() == pytest.approx([1e-3 * 2048**0.5] * 40, rel=0.01)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_none_or_all_has_a_standard_error(share):
    """Of 500 samples, none or all are near: a true share of 0.3 % less is likely enough to lie within two errors."""
    result = memorization(torch.full((500,), 1 - share), torch.rand(100_000))
    assert result.share == share
    assert 0.0018 < result.standard_error < 0.004


def test_only_the_neighbours_in_the_picture_are_looked_up(tmp_path):
    samples, train = photographs(100, 0), photographs(50, 1)
    found, distances = torch.full((100, 3), 10**6), torch.rand(100) + 1
    found[:16], found[-16:], distances[-16:] = 1, 2, 0.5
    save_neighbours(samples, train, found, distances, tmp_path / "a.png")
    save_neighbours(samples, train, found.clamp(max=7), distances, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    save_neighbours(samples, train, found.clamp(max=1), distances, tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(1, 8, 8\)"):
        nearest_neighbours(photographs(2, 0), photographs(5, 0)[:, :1], 1)
    with pytest.raises(ValueError, match="3 nearest.*only 2"):
        nearest_neighbours(photographs(2, 0), photographs(2, 0), 3)
    with pytest.raises(ValueError, match="3 nearest.*only 2"):
        nearest_neighbours(photographs(3, 0), photographs(3, 0), 3, exclude=torch.arange(3))
