"""The steered noise: it is noise, it goes where it should, and it costs what theory says."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from ddpm_hf.codec.channel import MEMORY, SharedRandomness, bits_for, steer, steered_noise
from ddpm_hf.codec.progressive import best_chain, bits_to_send, follow, plan_steps
from support.oracle import calibrated_scheduler

SHARED = SharedRandomness(7)


def shift_of(kl_bits, count, seed=0):
    """A shift u whose divergence ‖u‖²/2 is so many bits."""
    u = np.random.default_rng(seed).standard_normal(count)
    return u * math.sqrt(2 * math.log(2) * kl_bits) / np.linalg.norm(u)


def log_ratio(noise, shift, ratio):
    """Log q(x_s)/p(x_s) but for a constant, of the noise z with x_s = μ_p + σ_p z."""
    return -((noise - shift) ** 2).sum() / (2 * ratio) + (noise**2).sum() / 2


@pytest.mark.parametrize("ratio", [1.0, 0.8])
@pytest.mark.parametrize("count", [30, 1000])  # of several columns of the table, and of more than it has
def test_few_bits_name_the_best_of_all_codewords(count, ratio):
    C, shift = 7, shift_of(7, count)
    words = [np.array([word >> i & 1 for i in range(C)], np.uint8) for word in range(2**C)]
    scores = [log_ratio(steered_noise(SHARED, 3, word, count).astype(np.float64), shift, ratio) for word in words]
    chosen = steer(SHARED, 3, shift, ratio, C)
    found = log_ratio(steered_noise(SHARED, 3, chosen, count).astype(np.float64), shift, ratio)
    assert found == pytest.approx(max(scores), abs=1e-3)


@pytest.mark.parametrize("C", [MEMORY + 1, 100, 700])
def test_no_change_of_one_bit_is_better(C):
    count, ratio = 8 * C, 0.9
    shift = shift_of(C, count)
    bits = steer(SHARED, 1, shift, ratio, C)
    best = log_ratio(steered_noise(SHARED, 1, bits, count).astype(np.float64), shift, ratio)
    for i in range(0, C, 7):
        other = bits.copy()
        other[i] ^= 1
        assert log_ratio(steered_noise(SHARED, 1, other, count).astype(np.float64), shift, ratio) < best + 1e-3


def test_the_noise_goes_as_far_as_its_bits_allow():
    """Of q's draws, the component along the shift is ‖u‖ on average; C = ‖u‖²/2 bits must reach nearly that."""
    C, count = 2000, 40_000
    reached = [
        steered_noise(SHARED, draw, steer(SHARED, draw, u, 1.0, C), count) @ u / (u @ u)
        for draw, u in ((draw, shift_of(C, count, draw)) for draw in (1, 2))
    ]
    assert np.square(reached).min() > 0.89  # of the bits: at most 12 % are lost
    assert np.max(reached) < 1


def test_what_is_not_steered_is_standard_normal_and_is_not_correlated():
    C, count = 500, 50_000
    u = shift_of(C, count)
    noise = steered_noise(SHARED, 1, steer(SHARED, 1, u, 1.0, C), count)
    rest = noise - u * (noise @ u) / (u @ u)
    assert stats.kstest(rest, "norm").pvalue > 0.01
    assert abs(np.corrcoef(rest[:-1], rest[1:])[0, 1]) < 4 / math.sqrt(count)
    other = steered_noise(SHARED, 2, steer(SHARED, 2, u, 1.0, C), count)
    other -= u * (other @ u) / (u @ u)
    assert abs(np.corrcoef(rest, other)[0, 1]) < 4 / math.sqrt(count)


def test_no_bits_are_plain_noise():
    assert len(steer(SHARED, 5, np.ones(9), 1.0, 0)) == 0
    noise = steered_noise(SHARED, 5, np.zeros(0, np.uint8), 20_000)
    assert stats.kstest(noise, "norm").pvalue > 0.01


def test_bits_follow_the_divergence():
    assert bits_for(0) == 0
    counts = [bits_for(kl) for kl in np.linspace(0, 200, 2001)]
    assert counts == sorted(counts)
    assert bits_for(10_000) / 10_000 < 1.001


# --- the whole chain, with the closed form of x_0 ~ N(0, v) -----------------------------------------------------------

VARIANCE = 0.25


def test_a_gaussian_source_is_sent_near_its_rate_distortion_function_and_x_t_has_nearly_the_law_of_q():
    """R(D) = ½ log₂(v/D), which no code beats, and x_t ~ N(sqrt(ᾱ_t) x_0, (1 - ᾱ_t) I) (Eq. 4)."""
    scheduler = calibrated_scheduler(VARIANCE)
    steps = plan_steps(scheduler.process, best_chain(scheduler, 40))
    x_0 = math.sqrt(VARIANCE) * torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    choose = bits_to_send(steps, x_0, SHARED)
    received, sent = [], [0]

    def predict(x_t, t):
        alpha_bar = float(scheduler.process.alphas_cumprod[t])
        x_0_hat = VARIANCE * math.sqrt(alpha_bar) / (VARIANCE * alpha_bar + 1 - alpha_bar) * x_t
        received.append((alpha_bar, x_t, sent[-1], float((x_0_hat - x_0).square().mean())))
        return x_0_hat

    def bits_of(k, x_0_hat):
        bits = choose(k, x_0_hat)
        sent.append(sent[-1] + len(bits))
        return bits if sent[-1] < x_0.numel() else None

    follow(predict, steps, x_0.shape, SHARED, bits_of)
    for alpha_bar, x_t, bits, distortion in received:
        noise = (x_t - math.sqrt(alpha_bar) * x_0) / math.sqrt(1 - alpha_bar)
        assert float(noise.mean()) == pytest.approx(0, abs=4 / math.sqrt(x_0.numel()))
        assert float(noise.var()) == pytest.approx(1, abs=0.1)
        assert float((noise * x_0).mean()) / math.sqrt(VARIANCE) == pytest.approx(0, abs=0.07)
        rate, least = bits / x_0.numel(), 0.5 * math.log2(VARIANCE / distortion)
        if rate > 0.15:
            assert least < rate < 1.15 * least
    assert rate > 0.6


def test_a_step_is_the_reverse_process_of_the_paper_and_the_shift_is_that_of_q():
    """x_s = μ_p + σ_p z with the optimal variance (arXiv 2201.06503), and u = (μ_q - μ_p)/σ_p (Eq. 7)."""
    scheduler = calibrated_scheduler(VARIANCE)
    process, shape = scheduler.process, (2, 1, 16, 16)
    steps = plan_steps(process, best_chain(scheduler, 8))
    x_0 = math.sqrt(VARIANCE) * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    choose, seen = bits_to_send(steps, x_0, SHARED), []

    def predict(x_t, t):
        x_0_hat = 0.3 * x_t
        seen.append((x_t, t, x_0_hat))
        return x_0_hat

    follow(predict, steps, shape, SHARED, choose)
    for k, ((x_t, t, x_0_hat), (x_s, s, _)) in enumerate(itertools.pairwise(seen)):
        q = process.q_posterior(x_0, x_t, t, s)
        p_mean = process.q_posterior(x_0_hat, x_t, t, s).mean
        p_std = math.sqrt(float(process.optimal_variance(float(scheduler.calibration.x_0_error[t]), t, s)))
        shift = ((q.mean - p_mean) / p_std).flatten().numpy()
        bits = steer(SHARED, k + 1, shift, float(q.variance.flatten()[0]) / p_std**2, steps[k].num_bits(x_0.numel()))
        noise = steered_noise(SHARED, k + 1, bits, x_0.numel()).reshape(shape)
        np.testing.assert_allclose(x_s, p_mean.numpy() + p_std * noise, atol=0.01)
