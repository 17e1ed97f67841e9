"""Statements of the paper (arXiv 2006.11239) about the process, against closed forms in other arithmetic."""

import math

import mpmath
import pytest
import torch
from scipy.stats import norm

from ddpm_hf.diffusion.ddpm_process import (
    BETA_SCHEDULES,
    PREDICTION_TYPES,
    DDPMProcess,
    PMeanVariance,
    discretized_gaussian_log_likelihood,
    make_betas,
    normal_kl,
    rescale_zero_terminal_snr,
)

LINEAR = DDPMProcess(make_betas("linear"))
PAIRS = [(0, -1), (1, 0), (1, -1), (4, 3), (500, 499), (500, 250), (999, 998), (999, 0), (999, -1)]


@pytest.fixture
def images():
    return torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(3, 2, 4, 4, dtype=torch.float64)


def close(actual, expected, rtol=1e-12, atol=0.0):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=rtol,
        atol=atol,
    )


# --- schedules -----------------------------------------------------------------------------------------------------


def test_linear_schedule_is_the_papers():
    betas = make_betas("linear")
    assert len(betas) == 1000
    close(betas[[0, 1, 999]], [1e-4, 1e-4 + 0.0199 / 999, 0.02])
    close(DDPMProcess(betas).alphas_cumprod[-1], 4.0358e-05, rtol=1e-4)


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_schedules_agree_with_stock_diffusers_up_to_its_float32(schedule, T):
    from diffusers import DDPMScheduler

    stock = DDPMScheduler(num_train_timesteps=T, beta_schedule=schedule)
    close(make_betas(schedule, T), stock.betas.double(), rtol=2e-4, atol=1e-7)


def test_cosine_schedule_is_the_formula_of_improved_ddpm():
    alpha_bar = DDPMProcess(make_betas("squaredcos_cap_v2")).alphas_cumprod
    u = (torch.arange(999, dtype=torch.float64) + 1) / 1000
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    close(alpha_bar[:-1], f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-11)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_zero_terminal_snr_ends_at_zero_and_keeps_the_first_step(schedule):
    betas = make_betas(schedule)
    process = DDPMProcess(rescale_zero_terminal_snr(betas))
    assert process.alphas_cumprod[-1] == 0
    assert process.has_zero_terminal_snr
    close(process.alphas_cumprod[0], 1 - betas[0])
    before, after = DDPMProcess(betas).alphas_cumprod.sqrt(), process.alphas_cumprod.sqrt()
    close((after - after[-1]) / (after[0] - after[-1]), (before - before[-1]) / (before[0] - before[-1]), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "quadratic"}, "beta_schedule.*'quadratic'.*'linear'"),
        ({"num_train_timesteps": 0}, "num_train_timesteps.*0.*from 1 to 100000"),
        ({"num_train_timesteps": 10.0}, "num_train_timesteps.*10.0"),
        ({"beta_start": -1.0}, "beta_start.*-1"),
        ({"beta_end": 2.0}, "beta_end.*2.*between 0 and 1"),
        ({"beta_start": float("nan")}, "beta_start.*nan"),
        ({"beta_start": 0.5}, "beta_start.*must not exceed"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_betas(**arguments)


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, -0.1], [1.0, 0.1], [0.1, float("nan")], [[0.1]], [0.1, 1.1]])
def test_bad_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        DDPMProcess(betas)


# --- tables: right to the last digits ------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_tables_agree_with_fifty_digit_arithmetic(schedule):
    betas = make_betas(schedule)
    process = DDPMProcess(betas)
    with mpmath.workdps(50):
        alpha_bar = [mpmath.mpf(1)]
        for beta in betas.tolist():
            alpha_bar.append(alpha_bar[-1] * (1 - mpmath.mpf(beta)))
        for t, s in PAIRS:
            a_t, a_s = alpha_bar[t + 1], alpha_bar[s + 1]
            beta = 1 - a_t / a_s
            close(process.alpha_bar(t), float(a_t), rtol=1e-11)
            close(process.one_minus_alpha_bar(t), float(1 - a_t), rtol=1e-13)
            close(process.beta(t, s), float(beta), rtol=1e-11)
            close(process.snr(t), float(a_t / (1 - a_t)), rtol=1e-11)
            close(process.log_snr(t), float(mpmath.log(a_t / (1 - a_t))), rtol=1e-11)
            c_0, c_t, variance = process.posterior_coefficients(t, s)
            close(c_0, float(mpmath.sqrt(a_s) * beta / (1 - a_t)), rtol=1e-11)
            close(c_t, float(mpmath.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)), rtol=1e-11)
            close(variance, float((1 - a_s) / (1 - a_t) * beta), rtol=1e-11)


# --- forward process -----------------------------------------------------------------------------------------------


def test_closed_form_is_the_composition_of_single_steps(images):
    """Eq. 2 applied t + 1 times gives Eq. 4: the means multiply, the variances add up."""
    x_0, _ = images
    mean, variance = x_0, torch.zeros((), dtype=torch.float64)
    for t in range(300):
        step = LINEAR.q_step_mean_variance(mean, t)
        mean, variance = step.mean, variance * (1 - step.variance) + step.variance
        closed = LINEAR.q_mean_variance(x_0, t)
        torch.testing.assert_close(mean, closed.mean, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(variance, closed.variance, rtol=1e-11, atol=0)
        torch.testing.assert_close(closed.log_variance.exp(), closed.variance)


def test_samples_are_mean_plus_deviation_times_noise(images):
    x_0, noise = images
    q = LINEAR.q_mean_variance(x_0, 321)
    torch.testing.assert_close(LINEAR.q_sample(x_0, 321, noise), q.mean + q.variance.sqrt() * noise)
    q = LINEAR.q_step_mean_variance(x_0, 321, 123)
    torch.testing.assert_close(LINEAR.q_step(x_0, 321, noise, 123), q.mean + q.variance.sqrt() * noise)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_posterior_matches_bayes_rule(t, s, images):
    """q(x_s|x_t,x_0) ∝ q(x_t|x_s) q(x_s|x_0): precisions add, means are weighted by them (Eq. 6-7)."""
    x_0, x_t = images
    posterior = LINEAR.q_posterior(x_0, x_t, t, s)
    if s == -1:
        torch.testing.assert_close(posterior.mean, x_0)
        assert posterior.variance == 0
        assert posterior.log_variance.isfinite()
        return
    prior = LINEAR.q_mean_variance(x_0, s)
    likelihood = LINEAR.q_step_mean_variance(x_t, t, s)
    slope = 1 - likelihood.variance  # (the coefficient of x_s)²
    precision = 1 / prior.variance + slope / likelihood.variance
    mean = (prior.mean / prior.variance + slope.sqrt() * x_t / likelihood.variance) / precision
    torch.testing.assert_close(posterior.variance, 1 / precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(posterior.log_variance.exp(), posterior.variance)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_every_eta_keeps_the_marginal(t, s, eta):
    """∫ q_σ(x_s|x_t,x_0) q(x_t|x_0) dx_t = q(x_s|x_0), which is what makes eta free (arXiv 2010.02502, Lemma 1)."""
    c_0, c_t, variance = LINEAR.posterior_coefficients(t, s, eta)
    close(c_0 + c_t * LINEAR.alpha_bar(t).sqrt(), LINEAR.alpha_bar(s).sqrt(), rtol=1e-12)
    close(c_t**2 * LINEAR.one_minus_alpha_bar(t) + variance, 1 - LINEAR.alpha_bar(s), rtol=1e-9, atol=1e-15)


def test_posterior_defaults_to_the_previous_step(images):
    assert torch.equal(LINEAR.q_posterior(*images, 7).mean, LINEAR.q_posterior(*images, 7, 6).mean)


# --- predictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 4, 500, 999])
def test_each_prediction_gives_back_what_the_image_was_made_of(t, images):
    x_0, noise = images
    x_t = LINEAR.q_sample(x_0, t, noise)
    v = LINEAR.velocity(x_0, noise, t)
    truth = {"epsilon": noise, "sample": x_0, "v_prediction": v}
    for source in PREDICTION_TYPES:
        torch.testing.assert_close(LINEAR.predict_x0(truth[source], x_t, t, source), x_0, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(LINEAR.predict_eps(truth[source], x_t, t, source), noise, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x_0_and_noise_of_any_prediction_compose_x_t_and_give_the_prediction_back(prediction_type, images):
    prediction, x_t = images
    t = torch.tensor([0, 400, 999])
    x_0 = LINEAR.predict_x0(prediction, x_t, t, prediction_type)
    noise = LINEAR.predict_eps(prediction, x_t, t, prediction_type)
    torch.testing.assert_close(LINEAR.q_sample(x_0, t, noise), x_t, rtol=1e-7, atol=1e-7)
    back = {"epsilon": noise, "sample": x_0, "v_prediction": LINEAR.velocity(x_0, noise, t)}[prediction_type]
    torch.testing.assert_close(back, prediction, rtol=1e-7, atol=1e-7)


def test_velocity_is_the_derivative_of_x_t_along_the_angle(images):
    """With cos φ = sqrt(ᾱ): x_φ = cos φ x_0 + sin φ ε and v = dx_φ/dφ (arXiv 2202.00512, Appendix D)."""
    x_0, noise = images
    phi = math.acos(float(LINEAR.alpha_bar(300).sqrt()))
    h = 1e-6
    moved = [math.cos(p) * x_0 + math.sin(p) * noise for p in (phi - h, phi + h)]
    torch.testing.assert_close(LINEAR.velocity(x_0, noise, 300), (moved[1] - moved[0]) / (2 * h), rtol=1e-7, atol=1e-8)


# --- reverse process -----------------------------------------------------------------------------------------------


def test_mean_of_the_reverse_step_is_equation_11(images):
    eps, x_t = images
    t = torch.tensor([3, 500, 999])
    mean = LINEAR.p_mean_variance(eps, x_t, t).mean
    beta, alpha, alpha_bar = (v[t].reshape(-1, 1, 1, 1) for v in (LINEAR.betas, LINEAR.alphas, LINEAR.alphas_cumprod))
    torch.testing.assert_close(mean, (x_t - beta / (1 - alpha_bar).sqrt() * eps) / alpha.sqrt(), rtol=1e-9, atol=1e-10)


def test_clip_comes_before_the_mean(images):
    eps, x_t = images
    p = LINEAR.p_mean_variance(eps, x_t, 999, clip=lambda x: x.clamp(-1, 1))
    x_0 = LINEAR.predict_x0(eps, x_t, 999)
    assert x_0.abs().max() > 1
    torch.testing.assert_close(p.pred_x_0, x_0.clamp(-1, 1))
    torch.testing.assert_close(p.mean, LINEAR.q_posterior(x_0.clamp(-1, 1), x_t, 999).mean)


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_fixed_variances_are_beta_and_beta_tilde(t, s, images):
    eps, x_t = images
    small, large = (LINEAR.p_mean_variance(eps, x_t, t, s, variance_type=v) for v in ("fixed_small", "fixed_large"))
    close(large.variance, float(1 - LINEAR.alpha_bar(t) / LINEAR.alpha_bar(s)), rtol=1e-10)
    close(small.variance, float(LINEAR.q_posterior(eps, x_t, t, s).variance))
    for p, twin in ((small, "fixed_small_log"), (large, "fixed_large_log")):
        same = LINEAR.p_mean_variance(eps, x_t, t, s, variance_type=twin)
        assert torch.equal(p.variance, same.variance)
        assert torch.equal(p.log_variance, same.log_variance)
        assert p.log_variance.isfinite()


def test_learned_range_interpolates_the_logarithms_of_the_skipped_step(images):
    eps, x_t = images
    t, s = 800, 300
    for raw, expected in (
        (-1.0, LINEAR.posterior_coefficients(t, s)[2].log()),
        (1.0, LINEAR.beta(t, s).log()),
        (0.0, (LINEAR.posterior_coefficients(t, s)[2].log() + LINEAR.beta(t, s).log()) / 2),
    ):
        output = torch.cat([eps, torch.full_like(eps, raw)], dim=1)
        p = LINEAR.p_mean_variance(output, x_t, t, s, variance_type="learned_range")
        torch.testing.assert_close(p.log_variance, expected.expand_as(eps))
        torch.testing.assert_close(p.variance.log(), p.log_variance)
        assert torch.equal(p.mean, LINEAR.p_mean_variance(eps, x_t, t, s).mean)


def test_last_variance_is_clipped_to_that_of_the_second_step(images):
    """log β̃ is -∞ at the data; the paper's code takes β̃ of the second step, for the decoder and the learned range."""
    eps, x_t = images
    beta = LINEAR.betas
    second = (1 - (1 - beta[0])) / (1 - (1 - beta[0]) * (1 - beta[1])) * beta[1]
    fixed = LINEAR.p_mean_variance(eps, x_t, 0)
    assert fixed.variance == 0
    close(fixed.log_variance, second.log())
    for raw, expected in ((-1.0, second.log()), (1.0, beta[0].log())):
        output = torch.cat([eps, torch.full_like(eps, raw)], dim=1)
        p = LINEAR.p_mean_variance(output, x_t, 0, variance_type="learned_range")
        close(p.log_variance, expected.expand_as(eps))


def test_learned_variance_is_a_logarithm(images):
    eps, x_t = images
    p = LINEAR.p_mean_variance(torch.cat([eps, x_t], dim=1), x_t, 5, variance_type="learned")
    torch.testing.assert_close(p.variance, x_t.exp())


def test_model_outputs_of_the_wrong_shape_are_refused(images):
    eps, x_t = images
    with pytest.raises(ValueError, match="learned_range.*need"):
        LINEAR.p_mean_variance(eps, x_t, 5, variance_type="learned_range")
    with pytest.raises(ValueError, match="fixed_small.*need"):
        LINEAR.p_mean_variance(torch.cat([eps, eps], dim=1), x_t, 5)
    with pytest.raises(ValueError, match="variance_type.*'other'"):
        LINEAR.p_mean_variance(eps, x_t, 5, variance_type="other")
    with pytest.raises(ValueError, match="prediction_type.*'noise'"):
        LINEAR.p_mean_variance(eps, x_t, 5, prediction_type="noise")


# --- the bound -----------------------------------------------------------------------------------------------------


def test_prior_term_of_a_black_and_white_image():
    """FACTS: L_T of a ±1 image is 2.911e-05 bits/dim."""
    x_0 = torch.sign(torch.randn(2, 3, 8, 8))
    close(LINEAR.L_T(x_0), [2.911e-05] * 2, rtol=2e-4)
    with mpmath.workdps(50):
        a = mpmath.mpf(1)
        for beta in LINEAR.betas.tolist():
            a *= 1 - mpmath.mpf(beta)
        exact = 0.5 * (-a - mpmath.log(1 - a) + a) / mpmath.log(2)
    close(LINEAR.L_T(x_0.double()), [float(exact)] * 2, rtol=1e-10)


def test_prior_term_counts_the_square_of_the_image():
    x_0 = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    bits = LINEAR.L_T(x_0)
    a = float(LINEAR.alphas_cumprod[-1])
    close((bits - bits[0]) * 2 * math.log(2) / a, [0, 0.25, 1], rtol=1e-6, atol=1e-9)


def test_kl_matches_torch_distributions():
    m, v = torch.randn(2, 50, dtype=torch.float64), torch.rand(2, 50, dtype=torch.float64) + 0.01
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(m[0], v[0].sqrt()), torch.distributions.Normal(m[1], v[1].sqrt())
    )
    torch.testing.assert_close(normal_kl(m[0], v[0].log(), m[1], v[1].log()), expected)


@pytest.mark.parametrize(("t", "s"), [(1, 0), (500, 499), (999, 500)])
def test_middle_term_is_the_weighted_error_of_the_noise(t, s, images):
    """With σ² = β̃ the KL of Eq. 5 is c_0² ‖x_0 - x̂_0‖² / (2 β̃), which is Eq. 12 for s = t - 1."""
    x_0, noise = images
    x_t = LINEAR.q_sample(x_0, t, noise)
    eps = noise + 0.1
    p = LINEAR.p_mean_variance(eps, x_t, t, s)
    a_t, a_s, beta = (float(f) for f in (LINEAR.alpha_bar(t), LINEAR.alpha_bar(s), LINEAR.beta(t, s)))
    beta_tilde = (1 - a_s) / (1 - a_t) * beta
    weight = beta**2 * a_s / (2 * beta_tilde * a_t * (1 - a_t))
    expected = weight * 0.01 / math.log(2)
    close(LINEAR.L_t_minus_1(x_0, x_t, t, p, s), [expected] * 3, rtol=1e-8)


def test_middle_term_counts_the_mismatch_of_variances(images):
    """With the true noise and σ² = β the KL is that of two centred Gaussians."""
    x_0, noise = images
    x_t = LINEAR.q_sample(x_0, 10, noise)
    p = LINEAR.p_mean_variance(noise, x_t, 10, variance_type="fixed_large")
    ratio = float(LINEAR.posterior_coefficients(10)[2] / LINEAR.beta(10))
    close(LINEAR.L_t_minus_1(x_0, x_t, 10, p), [0.5 * (ratio - 1 - math.log(ratio)) / math.log(2)] * 3, rtol=1e-8)


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("mean", [-1.0, 0.1, 2.0])
def test_decoder_is_a_distribution_over_the_256_levels(mean, std):
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    log_p = discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(std**2).log())
    close(log_p.exp().sum(), 1.0, rtol=1e-12)


@pytest.mark.parametrize("num_levels", [2, 16, 1024])
def test_decoder_supports_other_numbers_of_levels(num_levels):
    levels = torch.linspace(-1, 1, num_levels, dtype=torch.float64)
    log_p = discretized_gaussian_log_likelihood(levels, torch.tensor(0.3), torch.tensor(0.04).log(), num_levels)
    close(log_p.exp().sum(), 1.0, rtol=1e-12)
    middle = num_levels // 2
    edges = levels[middle] + torch.tensor([-1.0, 1.0]) / (num_levels - 1)
    if num_levels > 2:
        close(log_p[middle].exp(), norm.cdf(edges[1], 0.3, 0.2) - norm.cdf(edges[0], 0.3, 0.2), rtol=1e-6)


def test_decoder_is_the_difference_of_cdfs_and_exact_in_the_tails():
    x = torch.tensor([-1.0, -0.5, 64 / 127.5 - 1, 1.0], dtype=torch.float64)
    edges = [(-math.inf, -1 + 1 / 255), (-0.5 - 1 / 255, -0.5 + 1 / 255)]
    edges += [(64 / 127.5 - 1 - 1 / 255, 64 / 127.5 - 1 + 1 / 255), (1 - 1 / 255, math.inf)]
    mean, std = 0.1, 0.2
    log_variance = torch.tensor(std**2, dtype=torch.float64).log()
    actual = discretized_gaussian_log_likelihood(x, torch.tensor(mean, dtype=torch.float64), log_variance)
    close(actual, [math.log(norm.cdf(b, mean, std) - norm.cdf(a, mean, std)) for a, b in edges], rtol=1e-9)
    far = discretized_gaussian_log_likelihood(x, torch.tensor(-1.0).double(), torch.tensor(1e-4).double().log())
    with mpmath.workdps(60):
        z = [(mpmath.mpf(e) + 1) / mpmath.mpf("0.01") for e in edges[3][:1]]
        exact = mpmath.log(mpmath.erfc(z[0] / mpmath.sqrt(2)) / 2)
    close(far[3], float(exact), rtol=1e-6)
    assert far[3] < -19000


def test_last_term_is_the_decoder_in_bits_per_dimension():
    x_0 = (torch.randint(0, 256, (4, 3, 8, 8)) / 127.5 - 1).float()
    x_1 = LINEAR.q_sample(x_0, 0, torch.randn_like(x_0))
    p = LINEAR.p_mean_variance(torch.randn_like(x_0), x_1, 0, variance_type="fixed_large")
    expected = -discretized_gaussian_log_likelihood(x_0, p.mean, p.log_variance).flatten(1).mean(1) / math.log(2)
    close(LINEAR.L_0(x_0, p), expected.float(), rtol=1e-6)
    perfect = PMeanVariance(x_0.double(), torch.tensor(1e-8), torch.tensor(1e-8).log(), x_0)
    close(LINEAR.L_0(x_0, perfect), [0.0] * 4, atol=1e-6)


def test_bound_of_gaussian_data_is_its_entropy():
    """For x_0 ~ N(0, 1), ε* = sqrt(1 - ᾱ) x_t and σ² = β, the reverse process is exact, so the bound is tight.

    Its expectation is closed: x̂_0 = sqrt(ᾱ) x_t and E (x_0 - x̂_0)² = 1 - ᾱ. The sum of Eq. 5, with a continuous
    decoder, is then the entropy 0.5 log(2πe).
    """
    total = 0.0
    for t in range(1, 1000):
        c_0, _, beta_tilde = (float(c) for c in LINEAR.posterior_coefficients(t))
        a_t, beta = float(LINEAR.alpha_bar(t)), float(LINEAR.beta(t))
        total += 0.5 * (beta_tilde / beta - 1 - math.log(beta_tilde / beta) + c_0**2 * (1 - a_t) / beta)
    a_1, a_T = float(LINEAR.alpha_bar(0)), float(LINEAR.alpha_bar(999))
    decoder = 0.5 * math.log(2 * math.pi * math.e * (1 - a_1))
    prior = 0.5 * (-a_T - math.log1p(-a_T) + a_T)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    assert total + decoder + prior == pytest.approx(entropy, abs=1e-9)


# --- shapes and dtypes ---------------------------------------------------------------------------------------------


def test_per_image_timesteps_equal_one_by_one(images):
    x_0, noise = images
    t, s = torch.tensor([0, 321, 999]), torch.tensor([-1, 100, 500])
    together = LINEAR.q_posterior(x_0, noise, t, s)
    for i in range(3):
        alone = LINEAR.q_posterior(x_0[i : i + 1], noise[i : i + 1], int(t[i]), int(s[i]))
        assert torch.equal(together.mean[i : i + 1], alone.mean)
        assert together.variance[i] == alone.variance
        assert torch.equal(
            LINEAR.q_sample(x_0, t, noise)[i], LINEAR.q_sample(x_0[i : i + 1], int(t[i]), noise[i : i + 1])[0]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(dtype):
    """In half precision, 1 - ᾱ of the first steps rounds to 0 and add_noise adds none at all (FACTS, trap 1)."""
    x_0, noise = torch.randn(10, 1, 8, 8).to(dtype), torch.randn(10, 1, 8, 8).to(dtype)
    t = torch.arange(10)
    x_t = LINEAR.q_sample(x_0, t, noise)
    assert x_t.dtype == dtype
    assert torch.equal(x_t, LINEAR.q_sample(x_0.float(), t, noise.float()).to(dtype))
    assert (x_t != x_0).float().mean() > 0.5
    assert LINEAR.predict_x0(noise, x_t, t).dtype == LINEAR.velocity(x_0, noise, t).dtype == dtype
    p = LINEAR.p_mean_variance(noise, x_t, t)
    assert p.mean.dtype == dtype
    assert torch.equal(p.mean, LINEAR.p_mean_variance(noise.float(), x_t.float(), t).mean.to(dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_narrow_integers_are_timesteps_too(dtype, images):
    x_0, noise = images
    t = torch.tensor([0, 7, 100])
    for of in (LINEAR.q_sample, lambda x, t, e: LINEAR.q_posterior(x, e, t).mean, LINEAR.q_step):
        torch.testing.assert_close(of(x_0, t.to(dtype), noise), of(x_0, t, noise), rtol=0, atol=0)


def test_empty_batches_pass_through():
    x, t = torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.long)
    assert LINEAR.q_sample(x, t, x).shape == x.shape
    assert LINEAR.p_mean_variance(x, x, t).mean.shape == x.shape


def test_bad_timesteps_and_images_are_refused(images):
    x_0, noise = images
    for t in (-1, 1000, torch.tensor([0, 1, 1000])):
        with pytest.raises(ValueError, match="out of range"):
            LINEAR.q_sample(x_0, t, noise)
    with pytest.raises(ValueError, match="earlier"):
        LINEAR.q_posterior(x_0, noise, 5, 5)
    with pytest.raises(ValueError, match="out of range"):
        LINEAR.q_posterior(x_0, noise, 5, -2)
    with pytest.raises(ValueError, match="one timestep for all, or 3"):
        LINEAR.q_sample(x_0, torch.tensor([1, 2]), noise)
    with pytest.raises(TypeError, match="integers"):
        LINEAR.q_sample(x_0, torch.tensor(0.5), noise)
    with pytest.raises(TypeError, match="floating"):
        LINEAR.q_sample(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), 5, torch.zeros(3, 1, 2, 2))
    with pytest.raises(ValueError, match="shapes differ"):
        LINEAR.q_sample(x_0, 5, noise[:1])
