"""Few steps: the optimal variance, the best timesteps and their calibration, against closed forms and brute force."""

import itertools
import logging
import math
import shutil
import warnings

import mpmath
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.ddpm_few_steps import Calibration, fingerprint, least_cost_timesteps, step_costs
from ddpm_hf.diffusion.ddpm_process import DDPMProcess, make_betas
from ddpm_hf.evaluation.calibration import calibrate, expected_rate, recommended_steps, steps_table
from support.oracle import OracleUNet, exact_x_0_error, gaussian_images, oracle_pipeline

SCHEDULES = ["linear", "squaredcos_cap_v2"]


def scheduler_for(c, **config):
    """A scheduler with the exact calibration of x_0 ~ N(0, c)."""
    scheduler = oracle_pipeline(c, **config).scheduler
    error = exact_x_0_error(scheduler.process, c)
    zeros = torch.zeros_like(error)
    second_moment = (1 - scheduler.alphas_cumprod) / (c * scheduler.alphas_cumprod + 1 - scheduler.alphas_cumprod)
    scheduler.set_calibration(
        Calibration(error, zeros, second_moment, zeros, 100, fingerprint(scheduler.process, scheduler.config))
    )
    return scheduler


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


# --- the optimal variance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("K", [2, 3, 10, 100])
@pytest.mark.parametrize("c", [0.05, 1.7])
def test_the_variance_of_gaussian_data_comes_back_at_every_number_of_steps(schedule, eta, K, c):
    scheduler = scheduler_for(c, variance_type="optimal", beta_schedule=schedule)
    for spacing in ("linspace", "optimal"):
        scheduler.set_timesteps(K, spacing=spacing)
        *_, before, after = chain_variance(scheduler, c, eta)
        first = scheduler.alphas_cumprod[0].item()
        assert before == pytest.approx(c * first + 1 - first, rel=2e-3)  # the marginal of x at t = 0
        assert after == pytest.approx(c, rel=4e-3)  # the last step adds no noise


def test_fixed_variances_lose_the_variance_of_gaussian_data_in_few_steps():
    for variance_type, low, high in (("fixed_small", 0, 0.75), ("fixed_large", 1.3, math.inf)):
        scheduler = scheduler_for(0.05, variance_type=variance_type)
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
    scheduler = scheduler_for(0.3, variance_type="optimal")
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
    scheduler = scheduler_for(0.3, variance_type="optimal", clip_sample=True)
    scheduler.set_timesteps(timesteps=[900, 400, 100, 7])
    process, error = scheduler.process, scheduler.calibration.x_0_error
    found = [float(scheduler._get_variance(t)) for t in (900, 400, 100)]
    unlimited = [float(process.optimal_variance(error[t], t, s)) for t, s in ((900, 400), (400, 100), (100, 7))]
    assert found[:2] == unlimited[:2]
    assert found[2] == pytest.approx(1 - float(process.alpha_bar(7)))
    assert found[2] < unlimited[2]


# --- the best timesteps --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("timesteps", [[999, 0], [999, 500, 0], [800, 700, 10, 3], list(range(999, -1, -1))])
def test_every_trajectory_costs_the_information_that_gaussian_data_holds(timesteps):
    """Independent Gaussian pixels make every reverse step Gaussian: the steps then tell I(x_0; x_first … x_last)."""
    c = 0.3
    scheduler = scheduler_for(c)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    information = 0.5 * torch.log2((1 + c * snr[timesteps[-1]]) / (1 + c * snr[timesteps[0]]))
    assert expected_rate(scheduler, timesteps) == pytest.approx(float(information), rel=1e-6)


def test_more_steps_cost_less_and_the_best_ones_least():
    scheduler = scheduler_for(0.2)
    # Half of the pixels vary little, half much: unlike those of one Gaussian, they are worth more steps.
    mixed = (exact_x_0_error(scheduler.process, 0.005) + exact_x_0_error(scheduler.process, 0.5)) / 2
    scheduler.calibration.x_0_error.copy_(mixed)
    rates = []
    for K in (5, 10, 25, 100, 1000):
        scheduler.set_timesteps(K, spacing="linspace")
        even, best = scheduler.timesteps.tolist(), scheduler.optimal_timesteps(K)
        assert len(set(best)) == K
        assert (best[0], best[-1]) == (999, 0)
        rates.append(expected_rate(scheduler, best))
        assert rates[-1] <= expected_rate(scheduler, even)
        for variance_type in ("fixed_small", "fixed_large"):
            assert expected_rate(scheduler, best) < expected_rate(scheduler, best, variance_type)
    assert rates == sorted(rates, reverse=True)


# --- measuring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_calibration_of_the_oracle_is_the_closed_form(prediction_type):
    c, n = 0.05, 400
    pipe = oracle_pipeline(
        c, num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )
    calibration = calibrate(pipe, gaussian_images(c, n), batch_size=150, show_progress=False)
    process = pipe.scheduler.process
    second_moment = (1 - process.alphas_cumprod) / (c * process.alphas_cumprod + 1 - process.alphas_cumprod)
    for value, error, exact in (
        (calibration.x_0_error, calibration.x_0_error_standard_error, exact_x_0_error(process, c)),
        (calibration.eps_second_moment, calibration.eps_second_moment_standard_error, second_moment),
    ):
        assert ((value - exact).abs() < 4.5 * error + 1e-5).all()  # 1e-5: images are rounded to 256 levels
        # The mean square of 64 independent Gaussians has a relative standard deviation of sqrt(2/64).
        torch.testing.assert_close(error / exact, torch.full_like(exact, (2 / 64 / n) ** 0.5), rtol=0.15, atol=0)
    assert calibration.num_images == n


def test_calibration_sees_the_x_0_that_sampling_uses():
    """A network that always says ε = 0 overshoots; with clipping, the error is bounded by the range of images."""
    images = gaussian_images(0.05, 20)
    pipe = oracle_pipeline(0.05, num_train_timesteps=30, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    pipe.unet.slope.zero_()
    assert calibrate(pipe, images, show_progress=False).x_0_error.max() < 4
    pipe = oracle_pipeline(0.05, num_train_timesteps=30, beta_schedule="squaredcos_cap_v2")
    pipe.unet.slope.zero_()
    assert calibrate(pipe, images, show_progress=False).x_0_error.max() > 1000


def test_batches_and_variance_channels_change_nothing():
    images = gaussian_images(0.1, 30)
    options = {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"}
    one = calibrate(oracle_pipeline(0.1, **options), images, num_images=20, seed=3, show_progress=False)
    for pipe, batch_size in (
        (oracle_pipeline(0.1, **options), 7),
        (oracle_pipeline(0.1, raw_variance=0.3, variance_type="learned_range", **options), 20),
    ):
        other = calibrate(pipe, images, num_images=20, seed=3, batch_size=batch_size, show_progress=False)
        torch.testing.assert_close(other.x_0_error, one.x_0_error, rtol=1e-6, atol=0)
    assert not torch.equal(
        calibrate(oracle_pipeline(0.1, **options), images, num_images=20, seed=4, show_progress=False).x_0_error,
        one.x_0_error,
    )


# --- keeping and loading -------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(make_unet):
    """A pipeline with a real network, calibrated and saying `optimal`."""
    scheduler = scheduler_for(0.2, variance_type="optimal", clip_sample=True, timestep_spacing="linspace")
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
    other = DDPMSchedulerCustom.from_config(scheduler_for(0.2, variance_type="optimal").config, **changed)
    with pytest.raises(ValueError, match=rf"{named}.*ddpm-hf calibrate"):
        other.set_timesteps(10)
    with pytest.raises(ValueError, match=named):
        other.set_timesteps(10, spacing="optimal")


@pytest.mark.parametrize("damage", [{}, {"x_0_error": [0.1]}, {"x_0_error": [-1.0] * 1000}, {"x_0_error": "much"}])
def test_a_damaged_calibration_is_named(damage):
    scheduler = scheduler_for(0.2)
    stored = {**scheduler.config["_calibration"], **damage} if damage else {}
    scheduler.register_to_config(_calibration=stored)
    scheduler = DDPMSchedulerCustom.from_config(scheduler.config)
    with pytest.raises(ValueError, match="`_calibration` of the scheduler is damaged"):
        scheduler.optimal_timesteps(5)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_without_a_calibration_the_remedy_is_named():
    with pytest.raises(ValueError, match="ddpm-hf calibrate"):
        DDPMSchedulerCustom(variance_type="optimal").set_timesteps(10)
    with pytest.raises(ValueError, match="ddpm-hf calibrate"):
        oracle_pipeline(0.1)(num_inference_steps=4, timesteps="optimal")
    with pytest.raises(ValueError, match="timestep_spacing.*'best'.*'optimal'"):
        oracle_pipeline(0.1)(num_inference_steps=4, timesteps="best")


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (gaussian_images(0.1, 15), {}, r"num_images` is 15.*at least 16"),
        (gaussian_images(0.1, 20), {"num_images": 21}, r"num_images` is 21.*only 20"),
        (gaussian_images(0.1, 20, size=16), {}, r"\(1, 16, 16\).*\(1, 8, 8\)"),
        (gaussian_images(0.1, 20, channels=3), {}, r"\(3, 8, 8\)"),
        (gaussian_images(0.1, 20)[0], {}, r"uint8 of \(1, 8, 8\).*\(N, C, H, W\)"),
        (gaussian_images(0.1, 20).float(), {}, "float32"),
        ([1, 2], {}, "list"),
        (gaussian_images(0.1, 20), {"batch_size": 0}, "batch_size"),
        (gaussian_images(0.1, 20), {"seed": -1}, "seed"),
        (gaussian_images(0.1, 20), {"class_labels": 1}, "unconditional"),
    ],
)
def test_bad_input_is_refused_before_the_network_runs(images, options, message, monkeypatch):
    pipe = oracle_pipeline(0.1)
    monkeypatch.setattr(OracleUNet, "forward", lambda *_, **__: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, images, show_progress=False, **options)
    assert "_calibration" not in pipe.scheduler.config


def test_networks_in_training_and_damaged_ones(make_unet):
    """Dropout is off while a network is measured; NaN is no calibration."""
    scheduler = DDPMSchedulerCustom(4, beta_schedule="squaredcos_cap_v2")
    pipe = DDPMPipelineCustom(make_unet(channels=1, dropout=0.5).train(), scheduler)
    first, second = (calibrate(pipe, gaussian_images(0.1, 16), show_progress=False).x_0_error for _ in range(2))
    assert torch.equal(first, second)
    assert pipe.unet.training
    torch.nn.init.constant_(pipe.unet.conv_out.bias, math.nan)
    with pytest.raises(ValueError, match="t = 0 holds NaN"):
        calibrate(pipe, gaussian_images(0.1, 16), show_progress=False)
    pipe.scheduler = DDPMSchedulerCustom(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero SNR"):
        calibrate(pipe, gaussian_images(0.1, 16), show_progress=False)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_second_order_steps_with_optimal_noise_compile_to_one_graph(eta):
    scheduler = scheduler_for(0.2, variance_type="optimal")
    scheduler.set_timesteps(timesteps=[900, 500, 300, 0])
    x, noise, before = torch.randn(3, 2, 1, 4, 4)

    def step(x, t):
        return scheduler.step(0.3 * x, t, x, ddim_eta=eta, variance_noise=noise, previous_x_0=before).prev_sample

    torch._dynamo.reset()  # or it would take eta for a variable
    t = torch.tensor([500, 300])
    torch.testing.assert_close(torch.compile(step, fullgraph=True, backend="eager")(x, t), step(x, t))


def test_other_schedulers_are_refused():
    pipe = oracle_pipeline(0.1)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler.*from_config"):
        calibrate(pipe, gaussian_images(0.1, 20))
    with pytest.raises(ValueError, match="DDIMScheduler"):
        pipe(num_inference_steps=4, timesteps="optimal")


# --- second order --------------------------------------------------------------------------------------------------


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


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def digits_model(make_unet, tmp_path):
    """A saved model of 16×16 digits, as a stock repository: T = 6 to be quick."""
    folder = tmp_path / "model"
    scheduler = DDPMScheduler(6, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1, sample_size=16), scheduler).save_pretrained(folder)
    return folder


CALIBRATE = ["--dataset", "digits", "--num_images", "16"]


def test_calibrate_command_makes_sample_command_take_optimal(digits_model, tmp_path, capsys):
    from ddpm_hf.cli import main

    weights = (digits_model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="error: .*ddpm-hf calibrate"):
        main(["sample", str(digits_model), "--steps", "3", "--spacing", "optimal", "--output_dir", str(tmp_path / "a")])
    main(["calibrate", str(digits_model), *CALIBRATE])
    assert "| 6 |" in capsys.readouterr().out
    assert (digits_model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights
    assert (digits_model / "ddpm_few_steps.py").is_file()
    options = ["--num_images", "2", "--output_dir", str(tmp_path / "b"), "--variance_type", "optimal"]
    main(["sample", str(digits_model), "--steps", "3", "--spacing", "optimal", *options])
    assert (tmp_path / "b" / "00001.png").is_file()
    main(["calibrate", str(digits_model), *CALIBRATE, "--output_dir", str(tmp_path / "copy")])
    first, second = (DDPMPipelineCustom.from_pretrained(f).scheduler.config for f in (digits_model, tmp_path / "copy"))
    assert first["_calibration"] == second["_calibration"]


def test_a_class_conditional_model_is_calibrated_with_its_labels(make_unet, tmp_path, capsys):
    from ddpm_hf.cli import main

    scheduler = DDPMScheduler(6, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1, sample_size=16, num_class_embeds=11), scheduler).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="error: .*class_labels"):
        main(["calibrate", str(tmp_path), *CALIBRATE])
    main(["calibrate", str(tmp_path), *CALIBRATE, "--label_column", "label"])
    assert "| 6 |" in capsys.readouterr().out
    assert DDPMPipelineCustom.from_pretrained(tmp_path).scheduler.calibration.num_images == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--dataset_name NAME"),
        (["--dataset", "digits", "--num_images", "15"], "num_images.*15.*at least 16"),
        (["--dataset", "digits", "--num_images", "3000"], "num_images.*3000.*1797"),
        ([*CALIBRATE, "--output_dir", "{model}/../other"], "output_dir.*holds another model"),
        (["--train_data_dir", "/nowhere"], "train_data_dir.*no such folder"),
    ],
)
def test_bad_calibrate_options_end_in_one_line_and_change_nothing(options, message, digits_model):
    from ddpm_hf.cli import main

    shutil.copytree(digits_model, digits_model.parent / "other")
    before = (digits_model / "scheduler" / "scheduler_config.json").read_bytes()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["calibrate", str(digits_model), *(option.format(model=digits_model) for option in options)])
    assert (digits_model / "scheduler" / "scheduler_config.json").read_bytes() == before


def test_fewest_steps_that_model_the_data_as_well():
    scheduler = scheduler_for(0.2)
    mixed = (exact_x_0_error(scheduler.process, 0.005) + exact_x_0_error(scheduler.process, 0.5)) / 2
    scheduler.calibration.x_0_error.copy_(mixed)
    enough = expected_rate(scheduler, range(999, -1, -1), "fixed_small")
    K = recommended_steps(scheduler)
    assert expected_rate(scheduler, scheduler.optimal_timesteps(K)) <= enough
    assert expected_rate(scheduler, scheduler.optimal_timesteps(K - 1)) > enough
    assert f"| 10 | {expected_rate(scheduler, [round(111 * k) for k in range(9, -1, -1)], 'fixed_small'):.3f} |" in (
        steps_table(scheduler)
    )
