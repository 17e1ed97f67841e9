"""Few steps: the optimal variance, the best timesteps and second order, against closed forms and brute force."""

import itertools
import logging
import math
import warnings

import mpmath
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.ddpm_few_steps import least_cost_timesteps, step_costs
from ddpm_hf.diffusion.ddpm_process import DDPMProcess, make_betas
from support.oracle import calibrated_scheduler, oracle_pipeline

SCHEDULES = ["linear", "squaredcos_cap_v2"]


def chain_variance(scheduler, c, eta=1.0):
    """The variance of a pixel before and after the last step of the oracle's chain, which is linear."""
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    alpha_bar, variance, history = scheduler.alphas_cumprod, 1.0, []
    for t in scheduler.timesteps.tolist():
        slope = (1 - alpha_bar[t]).sqrt() / (c * alpha_bar[t] + 1 - alpha_bar[t])
        a = scheduler.step(slope * one, t, one, variance_noise=zero, ddim_eta=eta).prev_sample.item()
        sigma = scheduler.step(zero, t, zero, variance_noise=one, ddim_eta=eta).prev_sample.item()
        variance = a**2 * variance + sigma**2
        history.append(variance)
    return history


# --- the optimal variance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("K", [2, 3, 10, 100])
@pytest.mark.parametrize("c", [0.05, 1.7])
def test_optimal_variances_reproduce_the_variance_of_gaussian_data_at_every_number_of_steps(schedule, eta, K, c):
    scheduler = calibrated_scheduler(c, variance_type="optimal", beta_schedule=schedule)
    for spacing in ("linspace", "optimal"):
        scheduler.set_timesteps(K, spacing=spacing)
        *_, before, after = chain_variance(scheduler, c, eta)
        first = scheduler.alphas_cumprod[0].item()
        assert before == pytest.approx(c * first + 1 - first, rel=2e-3)  # the marginal of x at t = 0
        assert after == pytest.approx(c, rel=4e-3)  # the last step adds no noise


def test_fixed_variances_lose_the_variance_of_gaussian_data_in_few_steps():
    for variance_type, low, high in (("fixed_small", 0, 0.75), ("fixed_large", 1.3, math.inf)):
        scheduler = calibrated_scheduler(0.05, variance_type=variance_type)
        scheduler.set_timesteps(10, spacing="linspace")
        assert low < chain_variance(scheduler, 0.05)[-1] / 0.05 < high


@pytest.mark.parametrize(("t", "s"), [(999, 800), (500, 499), (120, 40), (1, 0), (60, -1)])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_optimal_variance_is_theorem_1_in_other_arithmetic(t, s, eta):
    betas = make_betas("linear")
    second_moment = 0.6
    with mpmath.workdps(40):
        alpha_bar = [mpmath.mpf(1)]
        for beta in betas.tolist():
            alpha_bar.append(alpha_bar[-1] * (1 - mpmath.mpf(beta)))
        a_t, a_s = alpha_bar[t + 1], alpha_bar[s + 1]
        lambda_2 = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        root = mpmath.sqrt((1 - a_t) / (a_t / a_s)) - mpmath.sqrt(1 - a_s - lambda_2)
        expected = lambda_2 + root**2 * (1 - second_moment)
        error = (1 - a_t) / a_t * (1 - second_moment)
    actual = DDPMProcess(betas).optimal_variance(float(error), t, s, eta)
    assert float(actual) == pytest.approx(float(expected), rel=1e-11)


def test_optimal_noise_is_drawn_for_ddim_and_never_at_the_last_step():
    scheduler = calibrated_scheduler(0.3, variance_type="optimal")
    scheduler.set_timesteps(timesteps=[900, 300])
    x = torch.zeros(2, 1, 4, 4)
    for timestep in (900, torch.tensor([900, 900])):  # floats, and tensors as in a compiled step
        noisy = scheduler.step(x, timestep, x, torch.Generator().manual_seed(0), ddim_eta=0.0).prev_sample
        expected = scheduler.process.optimal_variance(scheduler.calibration.x_0_error[900], 900, 300, eta=0.0).sqrt()
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(noisy, expected.float() * drawn)
        assert not scheduler.step(x, timestep * 0 + 300, x, ddim_eta=0.0).prev_sample.any()
    assert float(scheduler._get_variance(300)) == pytest.approx(float(scheduler.calibration.x_0_error[300]))


def test_last_noise_of_clipped_images_is_that_of_the_forward_process():
    scheduler = calibrated_scheduler(0.3, variance_type="optimal", clip_sample=True)
    scheduler.set_timesteps(timesteps=[900, 400, 100, 7])
    process, error = scheduler.process, scheduler.calibration.x_0_error
    found = [float(scheduler._get_variance(t)) for t in (900, 400, 100)]
    unlimited = [float(process.optimal_variance(error[t], t, s)) for t, s in ((900, 400), (400, 100), (100, 7))]
    assert found[:2] == unlimited[:2]
    assert found[2] == pytest.approx(1 - float(process.alpha_bar(7)))
    assert found[2] < unlimited[2]


# --- the best timesteps -------------------------------------------------------------------------------------------


def test_step_cost_is_the_expected_kl_in_other_arithmetic():
    process = DDPMProcess(make_betas("linear", 20, 1e-3, 0.3))
    error = torch.linspace(0.01, 0.5, 20, dtype=torch.float64)
    costs = step_costs(process, error)
    alpha_bar = [mpmath.mpf(1)]
    for beta in process.betas.tolist():
        alpha_bar.append(alpha_bar[-1] * (1 - mpmath.mpf(beta)))
    for t, s in itertools.product(range(20), repeat=2):
        if s >= t:
            assert costs[t, s] == math.inf
            continue
        a_t, a_s = alpha_bar[t + 1], alpha_bar[s + 1]
        beta_tilde = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        c_0 = mpmath.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)
        sigma_2 = beta_tilde + c_0**2 * mpmath.mpf(error[t].item())
        assert float(costs[t, s]) == pytest.approx(float(mpmath.log(sigma_2 / beta_tilde) / 2), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_trajectory_is_the_cheapest_of_all(seed):
    T = 9
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(T, T, generator=generator, dtype=torch.float64).tril(-1)
    costs[torch.ones(T, T, dtype=torch.bool).triu()] = math.inf
    for K in range(2, T + 1):
        paths = [(T - 1, *reversed(inner), 0) for inner in itertools.combinations(range(1, T - 1), K - 2)]
        cheapest = min(paths, key=lambda path: sum(costs[t, s] for t, s in itertools.pairwise(path)))
        assert least_cost_timesteps(costs, K) == list(cheapest)
    assert least_cost_timesteps(costs, 1) == [T - 1]


# --- second order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "algorithm"), [(0.0, "dpmsolver++"), (1.0, "sde-dpmsolver++")])
@pytest.mark.parametrize("timesteps", [[999, 900, 750, 500, 220, 80], [990, 800, 400]])
def test_second_order_steps_are_those_of_dpm_solver(eta, algorithm, timesteps):
    ours = DDPMSchedulerCustom(clip_sample=False)
    stock = DPMSolverMultistepScheduler(algorithm_type=algorithm, lower_order_final=False, final_sigmas_type="zero")
    ours.set_timesteps(timesteps=timesteps)
    stock.set_timesteps(timesteps=timesteps)
    x = y = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    previous = None
    for i, t in enumerate(timesteps):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        timestep = t if i % 2 else torch.tensor([t, t])  # floats, and tensors as in a compiled step
        out = ours.step(torch.tanh(0.7 * x), timestep, x, ddim_eta=eta, variance_noise=noise, previous_x_0=previous)
        x, previous = out.prev_sample, out.pred_original_sample
        y = stock.step(torch.tanh(0.7 * y), t, y, variance_noise=noise).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-3)  # stock's tables are float32


def test_second_order_costs_no_calls_and_is_closer_to_the_exact_solution():
    """x_0 ~ N(0, c): the exact solution of the probability flow from x_T scales it to the data's variance."""
    c, errors = 0.2, {}
    pipe = oracle_pipeline(c)
    timesteps = [round(999 * (1 - k / 24) ** 2) for k in range(25)]
    for solver_order in (1, 2):
        pipe_options = {"eta": 0.0, "solver_order": solver_order, "output_type": "latent"}
        out = pipe(1, torch.Generator().manual_seed(0), timesteps=timesteps, **pipe_options).images
        x_T = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        errors[solver_order] = float((out - c**0.5 * x_T).abs().max())
    assert errors[2] < errors[1] / 4


def test_a_long_step_extrapolates_by_the_last_change_at_most():
    scheduler = DDPMSchedulerCustom(clip_sample=False)
    scheduler.set_timesteps(timesteps=[999, 60, 50, 0])  # the last step is 20 times the one before, in log-SNR
    x, before = torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)
    noise = torch.zeros_like(x)
    step = {"ddim_eta": 0.0, "variance_noise": noise}
    first = scheduler.step(0.1 * x, 50, x, **step)
    second = scheduler.step(0.1 * x, 50, x, previous_x_0=before, **step)
    c_0 = scheduler.process.posterior_coefficients(50, 0, 0.0)[0].float()
    change = first.pred_original_sample - before
    torch.testing.assert_close(second.prev_sample - first.prev_sample, c_0 * change)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_second_order_steps_with_optimal_noise_compile_to_one_graph(eta):
    scheduler = calibrated_scheduler(0.2, variance_type="optimal")
    scheduler.set_timesteps(timesteps=[900, 500, 300, 0])
    x, noise, before = torch.randn(3, 2, 1, 4, 4)

    def step(x, t):
        return scheduler.step(0.3 * x, t, x, ddim_eta=eta, variance_noise=noise, previous_x_0=before).prev_sample

    torch._dynamo.reset()  # or it would take eta for a variable
    t = torch.tensor([500, 300])
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x, t), step(x, t))


# --- a stored calibration -----------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(make_unet):
    """A pipeline with a real network, calibrated and saying `optimal`."""
    scheduler = calibrated_scheduler(0.2, variance_type="optimal", clip_sample=True, timestep_spacing="linspace")
    pipe = DDPMPipelineCustom(make_unet(channels=1), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    pipe.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipe(2, torch.Generator().manual_seed(0), 6, "np", **options).images)


def test_a_calibrated_repository_samples_the_same_after_every_load(calibrated, tmp_path):
    expected = sample(calibrated, timesteps="optimal")
    calibrated.save_pretrained(tmp_path / "a")
    stock = DDPMPipeline.from_pretrained(tmp_path / "a")
    stock.save_pretrained(tmp_path / "b")  # stock diffusers carries the calibration along
    for folder in ("a", "b"):
        assert torch.equal(sample(DDPMPipelineCustom.from_pretrained(tmp_path / folder), timesteps="optimal"), expected)
    remote = DiffusionPipeline.from_pretrained(
        tmp_path / "a", custom_pipeline=str(tmp_path / "a"), trust_remote_code=True
    )
    assert type(remote).__module__.startswith("diffusers_modules")
    assert torch.equal(sample(remote, timesteps="optimal"), expected)


def test_stock_schedulers_read_optimal_as_fixed_small_without_a_warning(calibrated, tmp_path, caplog):
    calibrated.save_pretrained(tmp_path)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        stock = DDPMPipeline.from_pretrained(tmp_path)
        images = sample(stock)
        for scheduler in (DDIMScheduler, DPMSolverMultistepScheduler):
            scheduler.from_config(calibrated.scheduler.config)
    assert not caplog.records
    small = DDPMScheduler.from_config(stock.scheduler.config, variance_type="fixed_small")
    assert torch.equal(sample(DDPMPipeline(stock.unet, small)), images)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "betas"),
        ({"num_train_timesteps": 900}, "num_train_timesteps"),
        ({"prediction_type": "v_prediction"}, "prediction_type = 'epsilon'.*'v_prediction'"),
        ({"clip_sample": True}, "clip_sample = False.*True"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "sample"}, "betas"),
    ],
)
def test_a_calibration_of_another_process_is_refused(changed, named):
    other = DDPMSchedulerCustom.from_config(calibrated_scheduler(0.2, variance_type="optimal").config, **changed)
    with pytest.raises(ValueError, match=rf"{named}.*ddpm-hf calibrate"):
        other.set_timesteps(10)
    with pytest.raises(ValueError, match=named):
        other.set_timesteps(10, spacing="optimal")


@pytest.mark.parametrize("damage", [{}, {"x_0_error": [0.1]}, {"x_0_error": [-1.0] * 1000}, {"x_0_error": "much"}])
def test_a_damaged_calibration_is_refused(damage):
    scheduler = calibrated_scheduler(0.2)
    stored = {**scheduler.config["_calibration"], **damage} if damage else {}
    scheduler.register_to_config(_calibration=stored)
    scheduler = DDPMSchedulerCustom.from_config(scheduler.config)
    with pytest.raises(ValueError, match="`_calibration` of the scheduler is damaged"):
        scheduler.optimal_timesteps(5)


def test_without_a_calibration_the_error_names_the_remedy():
    with pytest.raises(ValueError, match="ddpm-hf calibrate"):
        DDPMSchedulerCustom(variance_type="optimal").set_timesteps(10)
    with pytest.raises(ValueError, match="ddpm-hf calibrate"):
        oracle_pipeline(0.1)(num_inference_steps=4, timesteps="optimal")
    with pytest.raises(ValueError, match="timestep_spacing.*'best'.*'optimal'"):
        oracle_pipeline(0.1)(num_inference_steps=4, timesteps="best")


def test_second_order_needs_our_scheduler_and_the_shape_of_the_images():
    with pytest.raises(ValueError, match=r"previous_x_0.*\(1, 1, 4, 4\).*\(2, 1, 4, 4\)"):
        DDPMSchedulerCustom().step(
            *torch.zeros(1, 2, 1, 4, 4), 9, torch.zeros(2, 1, 4, 4), previous_x_0=torch.zeros(1, 1, 4, 4)
        )
    pipe = oracle_pipeline(0.1)
    for order in (0, 3, 1.5):
        with pytest.raises(ValueError, match="solver_order"):
            pipe(num_inference_steps=3, solver_order=order)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="solver_order.*DDIMScheduler"):
        pipe(num_inference_steps=3, solver_order=2)
