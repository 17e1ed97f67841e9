"""Bits per dimension, term by term, against closed forms for Gaussian data and loops over the equations."""

import itertools
import math

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from scipy.special import ndtr

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.evaluation.calibration import calibrate
from ddpm_hf.evaluation.likelihood import bits_per_dim, combine, rate_distortion
from ddpm_hf.evaluation.predictions import draw_indices
from support.oracle import exact_x_0_error, gaussian_images, oracle_pipeline

C = 0.05
COSINE = {"num_train_timesteps": 40, "beta_schedule": "squaredcos_cap_v2"}
QUIET = {"show_progress": False}
LN2 = math.log(2)


@pytest.fixture(scope="module")
def images():
    return gaussian_images(C, 300)


@pytest.fixture(scope="module")
def oracle(images):
    pipe = oracle_pipeline(C, **COSINE, timestep_spacing="linspace")
    calibrate(pipe, images, **QUIET)
    return pipe


def closed_form(process, timesteps, variance_type):
    """L_T, the expected L_{t-1} of each step and E‖x_0 - x̂_0‖²/d, for x_0 ~ N(0, C) and the best network."""
    error = exact_x_0_error(process, C)
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), process.alphas_cumprod])
    terms = []
    for t, s in itertools.pairwise(timesteps):
        a_t, a_s = alpha_bar[t + 1], alpha_bar[s + 1]
        beta = 1 - a_t / a_s
        beta_tilde = (1 - a_s) / (1 - a_t) * beta
        needed = beta_tilde + a_s * (beta / (1 - a_t)) ** 2 * error[t]
        variance = {"fixed_small": beta_tilde, "fixed_large": beta, "optimal": needed}[variance_type]
        terms.append(0.5 * (math.log(variance / beta_tilde) + needed / variance - 1) / LN2)
    a_T = alpha_bar[timesteps[0] + 1].item()
    return 0.5 * (a_T * C - a_T - math.log1p(-a_T)) / LN2, torch.tensor(terms), error[timesteps]


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "optimal"])
@pytest.mark.parametrize("timesteps", [None, [39, 0], [39, 30, 12, 3, 0], [25, 12, 5]])
def test_terms_of_the_oracle_are_the_closed_form(oracle, images, variance_type, timesteps):
    bits = bits_per_dim(oracle, images, timesteps=timesteps, variance_type=variance_type, **QUIET)
    visited = timesteps or list(range(39, -1, -1))
    L_T, terms, x_0_error = closed_form(oracle.scheduler.process, visited, variance_type)
    assert bits.timesteps == visited
    assert abs(bits.L_T / L_T - 1) < 0.03
    # 300 images of 64 pixels know a mean square to a relative standard deviation of 1 %.
    torch.testing.assert_close(bits.terms[:-1], terms, rtol=0.045, atol=1e-4)
    torch.testing.assert_close(bits.x_0_mse, x_0_error, rtol=0.045, atol=2e-5)
    assert bits.total == pytest.approx(bits.L_T + float(bits.terms.sum()), rel=1e-9)


def test_the_bound_with_optimal_variances_is_the_entropy_of_gaussian_data(oracle, images):
    """The reverse process is then the true one, whatever the trajectory: the bound is tight."""
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    edges = torch.cat([torch.tensor([-math.inf]), (x[1:] + x[:-1]) / 2, torch.tensor([math.inf])]) / C**0.5
    mass = torch.as_tensor(ndtr(edges)).diff()
    entropy = float(-(mass * mass.log2())[mass > 0].sum())
    for timesteps in (None, [39, 20, 8, 2, 0]):
        bits = bits_per_dim(oracle, images, timesteps=timesteps, variance_type="optimal", **QUIET)
        assert abs(bits.total - entropy) < 4 * bits.standard_error + 0.02  # t = 0 has noise beside 256 levels
        assert bits.standard_error < 0.02


def test_an_estimate_is_unbiased_with_a_correct_standard_error(oracle, images):
    exact = bits_per_dim(oracle, images, **QUIET)
    errors = []
    for calls in (2, 5, 13, 39):
        estimate = bits_per_dim(oracle, images, calls_per_image=calls, seed=1, **QUIET)
        assert estimate.calls_per_image == calls
        assert abs(estimate.total - exact.total) < 4 * math.hypot(estimate.standard_error, exact.standard_error)
        errors.append(estimate.standard_error)
    assert errors == sorted(errors, reverse=True)
    # Two calls: L_0, and one of 39 terms that stands for all. What it must cost follows from the exact terms.
    spread = 39 * float(exact.terms[:-1].std()) / math.sqrt(300)
    assert errors[0] == pytest.approx(spread, rel=0.25)


def test_an_estimate_compensates_for_the_timesteps_it_leaves_out(oracle, images):
    """Averaged over images that are all alike, so that chance is in the noise and the timesteps alone."""
    alike = images[:1].expand(6000, -1, -1, -1)
    steps = {"timesteps": [39, 16, 7, 3, 0], "variance_type": "optimal"}
    exact = bits_per_dim(oracle, alike, **steps, **QUIET)
    estimate = bits_per_dim(oracle, alike, calls_per_image=4, seed=5000, **steps, **QUIET)
    error = math.hypot(estimate.standard_error, exact.standard_error)
    assert abs(estimate.total - exact.total) < 3 * error
    assert error < 0.005 * (exact.total - exact.L_0)


def test_every_term_is_visited_equally_often():
    from ddpm_hf.evaluation.likelihood import _columns

    columns = _columns(11, 4000, 5, seed=0)
    assert (columns.diff(dim=1) > 0).all()
    assert (columns[:, -1] == 10).all()
    met = torch.bincount(columns[:, :-1].flatten(), minlength=10)
    assert (met / 4000 - 0.4).abs().max() < 4 * math.sqrt(0.24 / 4000)


def test_terms_are_the_equations_one_by_one(make_unet):
    """A real network, clipping and learned variances, against a loop that a reader of the paper would write."""
    from ddpm_hf import DDPMSchedulerCustom

    scheduler = DDPMSchedulerCustom(**COSINE, variance_type="learned_range", prediction_type="v_prediction")
    pipe = DDPMPipelineCustom(make_unet(channels=1, out_channels=2), scheduler)
    images = gaussian_images(C, 3)
    bits = bits_per_dim(pipe, images, timesteps=[30, 7, 0], batch_size=2, **QUIET)
    process, x_0 = scheduler.process, images.float() / 127.5 - 1
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    low_at_data = process.posterior_coefficients(7, 0)[2].log()  # stands in for log β̃ = -∞ of the last step
    for k, (t, s) in enumerate([(30, 7), (7, 0), (0, -1)]):
        x_t = process.q_sample(x_0, t, torch.stack([torch.randn(1, 8, 8, generator=g) for g in generators]))
        with torch.no_grad():
            prediction, raw = pipe.unet(x_t, t).sample.chunk(2, dim=1)
        pred_x_0 = process.predict_x0(prediction, x_t, t, "v_prediction").clamp(-1, 1).double()
        c_0, c_t, beta_tilde = process.posterior_coefficients(t, s)
        low = beta_tilde.log() if s >= 0 else low_at_data
        log_variance = low + (raw.double() + 1) / 2 * (process.beta(t, s).log() - low)
        mean = c_0 * pred_x_0 + c_t * x_t
        if s >= 0:
            true_mean = c_0 * x_0 + c_t * x_t
            ratio = beta_tilde / log_variance.exp()
            nats = 0.5 * (ratio - ratio.log() - 1 + (mean - true_mean) ** 2 / log_variance.exp())
        else:
            std = (log_variance / 2).exp()
            upper = torch.where(x_0 > 0.999, 1.0, torch.special.ndtr((x_0 - mean + 1 / 255) / std))
            lower = torch.where(x_0 < -0.999, 0.0, torch.special.ndtr((x_0 - mean - 1 / 255) / std))
            nats = -(upper - lower).log()
        assert float(bits.terms[k]) == pytest.approx(float(nats.mean()) / LN2, rel=1e-4)


def test_learned_ranges_end_at_the_fixed_variances(images):
    fixed = oracle_pipeline(C, **COSINE)
    for raw, variance_type in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        learned = oracle_pipeline(C, raw_variance=raw, variance_type="learned_range", **COSINE)
        expected = bits_per_dim(fixed, images[:20], variance_type=variance_type, num_inference_steps=7, **QUIET)
        found = bits_per_dim(learned, images[:20], num_inference_steps=7, **QUIET)
        torch.testing.assert_close(found.terms, expected.terms, rtol=1e-5, atol=1e-8)
        assert found.variance_type == "learned_range"


def test_rate_and_distortion_follow_the_chain(oracle, images):
    bits = bits_per_dim(oracle, images, **QUIET)
    curve = rate_distortion(bits)
    assert curve.timesteps == list(range(39, -1, -1))
    assert float(curve.rate[0]) == pytest.approx(bits.L_T)
    assert float(curve.rate[-1]) + bits.L_0 == pytest.approx(bits.total)
    assert (curve.rate.diff() > 0).all()
    assert (curve.distortion.diff()[20:] < 0).all()  # before, x_t knows nothing of x_0
    expected = exact_x_0_error(oracle.scheduler.process, C).flip(0).sqrt() * 127.5
    torch.testing.assert_close(curve.distortion, expected, rtol=0.03, atol=0.05)
    torch.testing.assert_close((curve.distortion / 127.5) ** 2, bits.x_0_mse)  # 255 levels span [-1, 1]
    with pytest.raises(ValueError, match="timesteps were left out.*calls_per_image"):
        rate_distortion(bits_per_dim(oracle, images, num_images=2, calls_per_image=3, **QUIET))


def test_any_repository_can_be_measured(make_unet, tmp_path):
    DDPMPipeline(make_unet(), DDPMScheduler(**COSINE)).save_pretrained(tmp_path)
    pipe = DDPMPipelineCustom.from_pretrained(tmp_path)
    pipe.scheduler.set_timesteps(3)
    bits = bits_per_dim(pipe, gaussian_images(C, 4, channels=3), num_inference_steps=5, **QUIET)
    assert math.isfinite(bits.total)
    assert len(pipe.scheduler.timesteps) == 3  # what the caller was sampling is left alone


def test_combined_parts_equal_the_whole(oracle, images):
    whole = bits_per_dim(oracle, images, num_images=50, seed=7, **QUIET)
    chosen = draw_indices(len(images), 50, seed=7).split([20, 2, 28])
    parts = [bits_per_dim(oracle, images, indices=part, seed=7, **QUIET) for part in chosen]
    found = combine(parts)
    assert (found.num_images, found.timesteps) == (50, whole.timesteps)
    for name in ("total", "standard_error", "L_T"):
        assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12), name
    for name in ("terms", "x_0_mse", "eps_mse"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance_type": "best"}, "variance_type.*'best'.*'optimal'"),
        ({"variance_type": "learned_range"}, "predicts no variance"),
        ({"variance_type": "optimal"}, "ddpm-hf calibrate"),
        ({"timesteps": [3, 5]}, "descend"),
        ({"timesteps": [5, 3], "num_inference_steps": 2}, "both"),
        ({"num_inference_steps": 41}, "num_inference_steps.*41"),
        ({"calls_per_image": 1}, "calls_per_image.*1.*from 2 to 39"),
        ({"calls_per_image": 40}, "calls_per_image.*40"),
        ({"num_images": 1}, "num_images.*1.*at least 2"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(oracle_pipeline(C, **COSINE), gaussian_images(C, 5), **options, **QUIET)
