"""What an image costs, against closed forms: for Gaussian data and the best network, the entropy itself."""

import math

import numpy as np
import pytest
import torch

from ddpm_hf.codec.compress import encode, gather
from ddpm_hf.codec.decompress import decode
from ddpm_hf.codec.levels import make_levels, real
from ddpm_hf.codec.lossless import _stds
from ddpm_hf.codec.opening import to_words
from ddpm_hf.codec.stack import WINDOW, BitStack, StackTooShortError, _radius
from ddpm_hf.evaluation.likelihood import ReverseChain, bits_per_dim
from support.oracle import calibrated_scheduler, gaussian_images, oracle_pipeline

C = 0.05
COSINE = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"}
ENTROPY = math.log2(math.sqrt(2 * math.pi * math.e * C) * 127.5)  # bits/dim of pixels ~ N(0, C)


def exact_pipeline(**options):
    pipe = oracle_pipeline(C, **COSINE, **options)
    pipe.scheduler = calibrated_scheduler(C, **COSINE)
    return pipe


@pytest.fixture(scope="module")
def exact():
    return exact_pipeline()


@pytest.mark.parametrize("K", [1, 4, 20])
def test_with_the_best_network_and_variance_images_cost_their_entropy_in_any_number_of_steps(exact, K):
    """The reverse chain of Gaussian data is Gaussian: no step loses anything, and nor may the coder."""
    images = gaussian_images(C, 300)
    timesteps = [99] if K == 1 else "optimal"
    result = encode(exact, gather(images, exact), timesteps=timesteps, num_inference_steps=None if K == 1 else K)
    # 19,000 pixels know their mean information to 0.007 bits; clipped and rounded, they are not quite Gaussian.
    x = (images[result.report.opening :].double() / 127.5 - 1).flatten()
    of_these_images = math.log2(math.sqrt(2 * math.pi * C) * 127.5) + float((x**2).mean()) / (2 * C * math.log(2))
    assert abs(of_these_images - ENTROPY) < 0.03
    assert abs(result.report.rate - of_these_images) < 0.012
    assert all((got == image.numpy()).all() for (_, got), image in zip(decode(exact, result.data), images, strict=True))


@pytest.mark.parametrize(("variance_type", "K"), [("fixed_small", 50), ("fixed_large", 20), ("optimal", 8)])
def test_the_rate_is_the_bound_whatever_the_variance(exact, variance_type, K):
    """Also where p is not the true reverse step, and bits would be no coin tosses if they were not mixed."""
    images, chain = gaussian_images(C, 400), {"num_inference_steps": K, "variance_type": variance_type}
    report = encode(exact, gather(images, exact), timesteps="linspace", **chain).report
    # What 25,000 values leave open: each step's cost is a square of noise, and narrow variances multiply it.
    noise = {"fixed_small": 0.05, "fixed_large": 0.04, "optimal": 0.012}[variance_type]
    bound = bits_per_dim(exact, images[report.opening :], timesteps="linspace", show_progress=False, **chain)
    assert report.rate - report.bound < noise
    assert report.rate - bound.total < noise + 3 * bound.standard_error
    if variance_type == "fixed_small":  # far out in p, a value never costs more than 24 bits
        return
    assert report.rate - report.bound > -noise
    assert bound.total - ENTROPY > (0.05 if variance_type != "optimal" else -0.02)  # else nothing is compared
    # Term by term, from the data upwards.
    np.testing.assert_allclose(report.terms[:-1] / report.coded, bound.terms.flip(0), atol=0.03)
    np.testing.assert_allclose(report.bits / report.coded, report.terms / report.coded, atol=0.05)


def test_a_learned_variance_costs_what_it_says(exact):
    """Half way between log β̃ and log β."""
    pipe = oracle_pipeline(C, raw_variance=0.0, variance_type="learned_range", **COSINE)
    images = gaussian_images(C, 300)
    result = encode(pipe, gather(images, pipe), num_inference_steps=40, timesteps="linspace")
    assert abs(result.report.rate - result.report.bound) < 0.04
    bound = bits_per_dim(pipe, images, num_inference_steps=40, timesteps="linspace", show_progress=False)
    assert abs(result.report.rate - bound.total) < 0.04 + 3 * bound.standard_error
    assert all((got == image.numpy()).all() for (_, got), image in zip(decode(pipe, result.data), images, strict=True))


def test_the_file_is_as_long_as_the_report_says(exact):
    result = encode(exact, gather(gaussian_images(C, 100), exact), num_inference_steps=4)
    report = result.report
    assert report.file_bits == 8 * len(result.data)
    assert report.total == pytest.approx(8 * len(result.data) / (100 * 64))
    in_all = report.rate * report.coded * 64 + report.opening_bits + (report.file_bits - report.payload_bits)
    assert in_all == pytest.approx(report.file_bits)
    assert report.coded + report.opening == 100


def test_about_two_latents_are_borrowed(exact):
    """Whatever the number of levels; all of them, in the other order of bits-back coding."""
    levels = make_levels(ReverseChain(exact, 50, "linspace", "optimal"), 8)
    entropies = [math.log2(real(level.q_std) * math.sqrt(2 * math.pi * math.e)) for level in levels]
    report = encode(exact, gather(gaussian_images(C, 40), exact), num_inference_steps=50).report
    assert report.opening_bits < (sum(entropies[:2]) + 9) * 64  # and the last one is not divided
    assert sum(entropies) > 5 * 50


def test_popping_is_the_inverse_of_pushing(exact):
    (level, *_) = make_levels(ReverseChain(exact, 10, "linspace", "optimal"), 8)
    rng = np.random.default_rng(0)
    words = to_words(rng.bytes(100_000))
    below = rng.integers(-255, 256, 5000)
    stack = BitStack(words)
    z = stack.pop_q(below, level)
    # The moments of q, on which the rate depends
    residual = z - below * real(level.q_ratio)
    assert abs(residual.mean()) < 4 * real(level.q_std) / 5000**0.5
    assert abs(residual.std() / real(level.q_std) - 1) < 0.04
    assert stack.bits < 32 * len(words) - 5000 * 5
    stack.mix(3, 7, count=5000)
    stack.mix(3, 7, count=5000)
    stack.push_q(z, below, level)
    np.testing.assert_array_equal(stack.words, words)


def test_nothing_is_popped_that_is_not_there(exact):
    (level, *_) = make_levels(ReverseChain(exact, 10, "linspace", "optimal"), 8)
    stack = BitStack(to_words(bytes(range(1, 200))))
    with pytest.raises(StackTooShortError):
        stack.pop_q(np.zeros(5000, np.int64), level)
    np.testing.assert_array_equal(stack.words, to_words(bytes(range(1, 200))))


def test_standard_deviations_are_powers_of_two_computed_in_integers():
    np.testing.assert_allclose(_stds(), 2 ** (np.arange(-12 * 64, 24 * 64 + 1) / 64), rtol=1e-15)


def test_noise_on_black_and_white_stays_in_the_range_of_bins(exact):
    """Beyond it, a draw would enter again at the other end: once in two million, since no symbol has probability 0."""
    levels = make_levels(ReverseChain(exact, 20, "linspace", "optimal"), 4)
    mean = 255 * real(levels[0].q_ratio)
    for level, above in zip(levels, [*levels[1:], None], strict=True):
        assert mean + WINDOW * real(level.q_std) + 2 <= level.half
        if above:
            mean *= real(above.q_ratio)


@pytest.mark.parametrize("K", [1, 3, 25])
def test_two_draws_are_never_one_bin(exact, K):
    """Bins are a circle, on which a draw may go further than the range: it must not meet another one."""
    timesteps = [99] if K == 1 else "linspace"
    for level in make_levels(ReverseChain(exact, None if K == 1 else K, timesteps, "optimal"), 4):
        assert _radius(real(level.q_std)) <= level.half
        below = np.full(300_000, level.half, np.int64)
        words = to_words(np.random.default_rng(0).bytes(1_000_000))
        stack = BitStack(words)
        stack.push_q(stack.pop_q(below, level), below, level)
        np.testing.assert_array_equal(stack.words, words)


def test_bins_are_fine_where_a_latent_is_narrow(exact):
    for level in make_levels(ReverseChain(exact, 20, "linspace", "optimal"), 8):
        assert real(level.q_std) >= 8
        assert torch.equal(
            torch.tensor(level.half * 2.0**-level.exponent).float().double(),
            torch.tensor(level.half * 2.0**-level.exponent, dtype=torch.float64),
        )  # exact in float32
