"""Distances of feature sets against closed forms, independent code, and repeated draws."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from ddpm_hf.evaluation.metrics.distances import (
    Moments,
    frechet_distance,
    frechet_estimate,
    kernel_distance,
    moments,
    precision_recall,
)


def gaussian(mean, covariance):
    return Moments(torch.tensor(mean, dtype=torch.float64), torch.as_tensor(covariance, dtype=torch.float64), 0)


def random_covariance(D, seed):
    x = torch.randn(D, 2 * D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x @ x.mT / D


# --- Fréchet distance ----------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy():
    x = torch.randn(2345, 7) * 3 + 100
    found = moments(x)
    np.testing.assert_allclose(found.mean, x.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    assert found.num_images == 2345


def test_frechet_distance_of_one_dimension():
    a, b = gaussian([1.0], [[4.0]]), gaussian([3.0], [[0.25]])
    assert frechet_distance(a, b) == pytest.approx((1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    a, b = random_covariance(30, 1), random_covariance(30, 2)
    expected = float((a + b).trace() - 2 * np.trace(sqrtm((a @ b).numpy()).real))
    assert frechet_distance(gaussian([0.0] * 30, a), gaussian([0.0] * 30, b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_without_full_rank():
    east, north = gaussian([0.0, 0.0], [[1.0, 0], [0, 0]]), gaussian([0.0, 0.0], [[0.0, 0], [0, 1]])
    assert frechet_distance(east, north) == pytest.approx(2, abs=1e-14)
    x, y = torch.randn(20, 50, dtype=torch.float64), torch.randn(30, 50, dtype=torch.float64)
    p, q = x - x.mean(0), y - y.mean(0)
    overlap = torch.linalg.matrix_norm(p @ q.mT, "nuc") / math.sqrt(19 * 29)  # never forms a covariance
    expected = (x.mean(0) - y.mean(0)).square().sum() + p.square().sum() / 19 + q.square().sum() / 29 - 2 * overlap
    assert frechet_distance(moments(x), moments(y)) == pytest.approx(float(expected), rel=1e-12)


def test_frechet_distance_of_equal_sets_is_exactly_zero_and_of_shifted_ones_the_shift():
    for D in range(2, 12):
        x = torch.randn(100, D, dtype=torch.float64)
        assert frechet_distance(moments(x), moments(x.clone())) == 0.0
    x = torch.randn(100, 10, dtype=torch.float64)
    assert frechet_distance(moments(x), moments(x + 0.5)) == pytest.approx(2.5, rel=1e-10)
    assert 0 <= frechet_distance(moments(x), moments(x + 1e-9)) < 1e-12
    few = torch.randn(5, 10, dtype=torch.float64)  # not of full rank
    assert 0 <= frechet_distance(moments(few), moments(few + 1e-9)) < 1e-12


D = 8
SPREAD = torch.linspace(0.3, 1.5, D, dtype=torch.float64)
TRUTH = frechet_distance(
    gaussian([0.2] * D, (1.3 * SPREAD).square().diag()), gaussian([0.0] * D, SPREAD.square().diag())
)


def draws(count, n, m):
    """Pairs of sets from two Gaussians whose distance is TRUTH."""
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, D, dtype=torch.float64, generator=g) * 1.3 * SPREAD + 0.2
        yield x, torch.randn(m, D, dtype=torch.float64, generator=g) * SPREAD


def test_frechet_interval_covers_the_expected_distance_at_this_number_of_images():
    values, errors = torch.tensor([frechet_estimate(x, y, moments(y)) for x, y in draws(200, 300, 400)]).T[:2]
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.15)
    covered = ((values - values.mean()).abs() < 1.96 * errors).float().mean()
    assert 0.90 <= covered <= 0.99


def test_frechet_error_of_distant_sets_is_that_of_their_means():
    x, y = torch.randn(400, 1, dtype=torch.float64) + 50, torch.randn(900, 1, dtype=torch.float64)
    expected = 2 * 50 * math.sqrt(1 / 400 + 1 / 900)  # of (x̄ - ȳ)², the rest is small
    assert frechet_estimate(x, y, moments(y)).standard_error == pytest.approx(expected, rel=0.1)


def test_frechet_interval_includes_the_draw_of_either_set():
    x, y = next(draws(1, 200, 100_000))
    found = frechet_estimate(x, y, moments(y))
    assert found.value == pytest.approx(frechet_distance(moments(x), moments(y)), rel=1e-12)
    assert frechet_estimate(y, x, moments(x)).standard_error == pytest.approx(found.standard_error, rel=1e-9)
    x, y = next(draws(1, 100_000, 200))
    assert frechet_estimate(x, y, moments(y)).standard_error > found.standard_error / 3


def test_frechet_bias_is_the_excess_over_infinitely_many_images():
    reference = gaussian([0.0] * D, SPREAD.square().diag())
    found = [frechet_estimate(x, y, reference) for x, y in draws(400, 100, 2)]
    value, _, bias = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    assert value - TRUTH > 0.05
    assert bias == pytest.approx(value - TRUTH, rel=0.15)


# --- Kernel distance -----------------------------------------------------------------------------------------------


def test_kernel_distance_is_the_u_statistic_over_all_pairs():
    x, y = torch.randn(7, 3), torch.randn(5, 3) + 1

    def k(u, v):
        return (float(u.double() @ v.double()) / 3 + 1) ** 3

    within = [
        np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)
    ]  # fmt: skip
    between = np.mean([k(u, v) for u in x for v in y])
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(sum(within) - 2 * between, rel=1e-12)
    left_out = [kernel_distance(x[torch.arange(7) != i], y).value for i in range(7)]
    other = [kernel_distance(x, y[torch.arange(5) != i]).value for i in range(5)]
    variance = np.var(left_out) * 6 + np.var(other) * 4
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-9)


def test_kernel_distance_of_gaussians_in_closed_form():
    m = 0.5  # x ~ N(m, 1), y ~ N(0, 1): E x = m, E x² = m² + 1, E x³ = m³ + 3m
    truth = (m**3 + 3 * m) ** 2 + 3 * (m**2 + 1) ** 2 + 3 * m**2 + 1 + 4 - 2 * (3 * (m**2 + 1) + 1)
    found = [
        kernel_distance(torch.randn(300, 1, generator=g) + m, torch.randn(200, 1, generator=g))
        for g in map(torch.Generator().manual_seed, range(100))
    ]
    values, errors = torch.tensor(found).unbind(1)
    assert abs(float(values.mean()) - truth) < 3 * float(values.std()) / 10  # no bias at any N
    assert float(errors.mean() / values.std()) == pytest.approx(1, abs=0.2)
    assert ((values - truth).abs() < 1.96 * errors).float().mean() >= 0.88


def test_kernel_distance_of_one_distribution_is_zero_on_average():
    values = torch.tensor([kernel_distance(x, y * 1.3 + 0.2).value for x, y in draws(100, 60, 50)])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 10


# --- Precision and recall ------------------------------------------------------------------------------------------


def test_precision_and_recall_by_hand():
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    images = torch.tensor([[0.5], [1.5], [20.0], [21.0]])
    # With k = 1: the reference reaches 1 from each member; the images reach 1, 1, 1 and 1.
    assert precision_recall(images, reference, k=1) == (2 / 4, 3 / 6)
    # With k = 2, 20 reaches to 1.5, which is 18.5 away, and so takes in everything from 1.5 on.
    precision, recall = precision_recall(images, reference, k=2)
    assert (precision, recall) == (2 / 4, 6 / 6)


def test_precision_and_recall_of_equal_of_distant_and_of_collapsed_sets():
    reference = torch.randn(1200, 4)
    assert precision_recall(reference, reference) == (1.0, 1.0)
    assert precision_recall(reference + 100, reference) == (0.0, 0.0)
    precision, recall = precision_recall(torch.randn(1200, 4) * 0.1, reference)
    assert precision > 0.85
    assert recall < 0.1


# --- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "least"),
    [
        (lambda x: moments(x[:1]), 2),
        (lambda x: kernel_distance(x, x[:2]), 3),
        (lambda x: precision_recall(x[:3], x), 4),
        (lambda x: precision_recall(x, x[:3]), 4),
    ],
)
def test_too_small_sets_are_refused(call, least):
    with pytest.raises(ValueError, match=f"at least {least}"):
        call(torch.randn(10, 2))


def test_features_that_are_not_finite_are_refused():
    x = torch.randn(10, 2)
    x[3, 1] = math.nan
    for call in (moments, lambda x: kernel_distance(x, x), lambda x: precision_recall(x, x)):
        with pytest.raises(ValueError, match="NaN"):
            call(x)
