"""The scheduler: equal to stock diffusers where that is right, right where it is wrong (the traps of FACTS.md)."""

import logging
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ddpm_hf.diffusion.scheduling_ddpm_custom import TIMESTEP_SPACINGS, DDPMSchedulerCustom

SPACINGS = list(TIMESTEP_SPACINGS)


def make(**config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DDPMSchedulerCustom(**config)


def network(x, t):
    """A smooth stand-in for a network: no training, no closed form, but every sign and scale of output."""
    return torch.tanh(0.7 * x + float(t) / 1000 - 0.3)


def run_chain(scheduler, predict=network, shape=(2, 3, 8, 8), seed=0, dtype=torch.float32, **step_options):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x, generator=generator, **step_options).prev_sample
    return x


def moments_of_linear_chain(scheduler, eps_coefficient, **step_options):
    """Mean slope and variance at the end of a chain whose noise prediction is ε̂ = k_t x_t, exactly.

    Each step is then x_s = A x_t + σ ε; A comes from a step without noise, σ from a step at x_t = 0 with ε = 1.
    """
    variance = 1.0
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    history = []
    for t in scheduler.timesteps:
        k = eps_coefficient(int(t))
        a = scheduler.step(k * one, t, one, variance_noise=zero, **step_options).prev_sample.item()
        sigma = scheduler.step(zero, t, zero, variance_noise=one, **step_options).prev_sample.item()
        variance = a**2 * variance + sigma**2
        history.append(variance)
    return history


# --- equal to stock where stock is right ---------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_whole_chain_equals_the_stock_scheduler(variance_type, prediction_type):
    config = {"variance_type": variance_type, "prediction_type": prediction_type}
    torch.testing.assert_close(
        run_chain(DDPMSchedulerCustom(**config)), run_chain(DDPMScheduler(**config)), rtol=0, atol=2e-4
    )


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({}, 50),
        ({"clip_sample": False, "prediction_type": "v_prediction"}, 100),
        ({"clip_sample_range": 2.0, "beta_schedule": "scaled_linear"}, 20),
        ({"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9}, 20),
        ({"timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2"}, 30),
        ({"beta_schedule": "sigmoid", "steps_offset": 1}, 40),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "linspace"}, 25),
    ],
)
def test_short_trajectories_equal_the_stock_scheduler(config, steps):
    chains = []
    for scheduler in (DDPMSchedulerCustom(**config), DDPMScheduler(**config)):
        scheduler.set_timesteps(steps)
        if scheduler.timesteps[-1] != 0:  # here stock adds noise at the end: see the test of the last step
            scheduler.set_timesteps(timesteps=[*scheduler.timesteps.tolist(), 0])
        chains.append(run_chain(scheduler))
    torch.testing.assert_close(*chains, rtol=0, atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_eta_runs_from_ddim_to_ddpm(eta):
    config = {"clip_sample": True, "timestep_spacing": "leading", "set_alpha_to_one": True}
    ours, ddim = DDPMSchedulerCustom(), DDIMScheduler(**config)
    ours.set_timesteps(50)
    ddim.set_timesteps(50)
    torch.testing.assert_close(
        run_chain(ours, ddim_eta=eta), run_chain(ddim, eta=eta, use_clipped_model_output=True), rtol=0, atol=5e-4
    )
    if eta == 1:
        torch.testing.assert_close(run_chain(ours), run_chain(ours, ddim_eta=1.0), rtol=0, atol=0)


def test_forward_process_equals_the_stock_scheduler():
    x, noise = torch.randn(2, 5, 3, 4, 4)
    t = torch.tensor([0, 10, 400, 998, 999])
    ours, stock = DDPMSchedulerCustom(), DDPMScheduler()
    torch.testing.assert_close(ours.add_noise(x, noise, t), stock.add_noise(x, noise, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.get_velocity(x, noise, t), stock.get_velocity(x, noise, t), rtol=0, atol=1e-5)
    assert torch.equal(ours.scale_model_input(x, 5), x)
    assert ours.init_noise_sigma == 1
    assert len(ours) == 1000


# --- closed forms --------------------------------------------------------------------------------------------------


def test_unit_gaussian_keeps_its_variance_at_every_step():
    """x_0 ~ N(0, 1): with ε* = sqrt(1 - ᾱ) x_t and σ² = β the chain has variance 1 at every t."""
    scheduler = DDPMSchedulerCustom(variance_type="fixed_large", clip_sample=False)
    k = scheduler.process.one_minus_alpha_bar(torch.arange(1000)).sqrt()
    history = moments_of_linear_chain(scheduler, lambda t: k[t])
    # The last step adds no noise, so what is left is the variance of the prediction, ᾱ_1.
    np.testing.assert_allclose(history[:-1], 1.0, rtol=1e-11)
    assert history[-1] == pytest.approx(1 - 1e-4, rel=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 333, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.filterwarnings("ignore:timestep spacing")
def test_point_mass_is_reached_exactly(spacing, steps, eta):
    """x_0 = m: with the optimal ε* = (x_t - sqrt(ᾱ) m)/sqrt(1 - ᾱ) every chain ends at m, without variance."""
    scheduler = DDPMSchedulerCustom(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)

    def predict(x, t):
        a, b = scheduler.process.alpha_bar(t).sqrt(), scheduler.process.one_minus_alpha_bar(t).sqrt()
        return (x - 0.37 * a) / b

    end = run_chain(scheduler, predict, shape=(4, 1, 2, 2), dtype=torch.float64, ddim_eta=eta)
    torch.testing.assert_close(end, torch.full_like(end, 0.37), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_variance_of_a_point_mass_follows_the_forward_marginals(steps):
    """With σ² = β̃ the chain of a point mass has the variance 1 - ᾱ_s of q(x_s|x_0) on the way, whatever the grid.

    A coefficient of the reverse step that is 2 % off leaves this line at once.
    """
    scheduler = DDPMSchedulerCustom(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    variances = scheduler.process.one_minus_alpha_bar(torch.arange(1000))
    history = moments_of_linear_chain(scheduler, lambda t: variances[t] ** -0.5)
    # The chain starts at variance 1 instead of 1 - ᾱ_T = 0.99996, hence the tolerance.
    np.testing.assert_allclose(history[:-1], variances[scheduler.timesteps[1:]], rtol=5e-5)
    assert history[-1] == pytest.approx(0, abs=1e-12)


def test_wide_gaussian_needs_the_true_conditional_variance():
    """x_0 ~ N(0, c): in few steps β̃ is too narrow and β too wide, all the way (arXiv 2201.06503, Theorem 2)."""
    c, history = 0.25, {}
    for variance_type in ("fixed_small", "fixed_large"):
        scheduler = DDPMSchedulerCustom(variance_type=variance_type, clip_sample=False, timestep_spacing="trailing")
        scheduler.set_timesteps(10)
        a = scheduler.alphas_cumprod
        k = (1 - a).sqrt() / (c * a + 1 - a)
        history[variance_type] = np.array(moments_of_linear_chain(scheduler, lambda t, k=k: k[t])[:-1])
    truth = (c * a + 1 - a)[scheduler.timesteps[1:]].numpy()
    assert (history["fixed_small"] < truth).all()
    assert (history["fixed_large"] > truth).all()


# --- trajectories --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_gives_exactly_that_many(spacing):
    scheduler = DDPMSchedulerCustom(timestep_spacing=spacing)
    for steps in range(1, 1001):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(steps)
        t = scheduler.timesteps
        assert len(t) == steps
        assert (t.diff() < 0).all()
        assert t[-1] >= 0
        if spacing != "leading":
            assert t[0] == 999


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [5, 50, 1000])
def test_spacings_are_those_of_the_stock_scheduler(spacing, steps):
    ours, stock = DDPMSchedulerCustom(timestep_spacing=spacing), DDPMScheduler(timestep_spacing=spacing)
    ours.set_timesteps(steps)
    stock.set_timesteps(steps)
    assert torch.equal(ours.timesteps, stock.timesteps)


@pytest.mark.filterwarnings("ignore:timestep spacing")
def test_previous_timestep_comes_from_the_grid():
    scheduler = DDPMSchedulerCustom()
    assert scheduler.previous_timestep(999) == 998
    assert scheduler.previous_timestep(0) == -1
    scheduler.set_timesteps(timesteps=[900, 77, 3])
    assert [int(scheduler.previous_timestep(t)) for t in scheduler.timesteps] == [77, 3, -1]
    assert scheduler.previous_timestep(torch.tensor([900, 77, 3])).tolist() == [77, 3, -1]
    scheduler.set_timesteps(600)  # no divisor of T
    grid = [*scheduler.timesteps.tolist(), -1]
    assert [int(scheduler.previous_timestep(t)) for t in grid[:-1]] == grid[1:]


def test_spacing_can_be_chosen_per_call():
    scheduler = DDPMSchedulerCustom()
    scheduler.set_timesteps(10, spacing="trailing")
    assert scheduler.timesteps.tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert scheduler.config.timestep_spacing == "leading"


def test_leading_spacing_warns_where_it_does_not_start_from_noise():
    scheduler = DDPMSchedulerCustom()
    with pytest.warns(UserWarning, match="starts from pure noise at t = 599.*trailing"):
        scheduler.set_timesteps(600)
    laplace = make(beta_schedule="laplace", timestep_spacing="trailing")  # holds 3 % of signal even at T - 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(50)
        laplace.set_timesteps(10)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_last_step_of_the_trajectory_adds_no_noise(variance_type, spacing):
    scheduler = DDPMSchedulerCustom(variance_type=variance_type, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4)
    output = torch.randn(2, 6 if "learned" in variance_type else 3, 4, 4)
    last = scheduler.timesteps[-1]
    first, second = (scheduler.step(output, last, x, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert torch.equal(first.prev_sample, second.prev_sample)
    assert torch.equal(first.prev_sample, first.pred_original_sample)
    per_image = scheduler.step(output, last.expand(2), x)
    torch.testing.assert_close(per_image.prev_sample, first.prev_sample)


# --- the traps of FACTS.md -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_the_noise_it_should(dtype):
    """Trap 1."""
    scheduler = DDPMSchedulerCustom()
    x, noise, t = torch.randn(10, 3, 8, 8).to(dtype), torch.randn(10, 3, 8, 8).to(dtype), torch.arange(10)
    noisy = scheduler.add_noise(x, noise, t)
    assert noisy.dtype == dtype
    assert torch.equal(noisy, scheduler.add_noise(x.float(), noise.float(), t).to(dtype))
    assert (noisy != x).flatten(1).any(1).all()


def test_beta_is_recovered_to_float32_precision():
    """Trap 2: tables in float32 give back β_t with an error of up to 4.9e-4."""
    ours, stock = DDPMSchedulerCustom(), DDPMScheduler()

    def error(alphas_cumprod, betas):
        recovered = 1 - alphas_cumprod[1:] / alphas_cumprod[:-1]
        return float(((recovered - betas[1:]) / betas[1:]).abs().max())

    assert error(ours.alphas_cumprod, ours.betas) < 1e-11
    assert error(stock.alphas_cumprod, ours.betas) > 1e-4
    variance = torch.stack([ours._get_variance(t, variance_type="fixed_large") for t in range(1000)])
    torch.testing.assert_close(variance, ours.betas, rtol=1e-11, atol=0)


@pytest.mark.parametrize("variance_type", ["fixed_large_log", "learned", "learned_range"])
def test_no_variance_type_gives_nan(variance_type):
    """Trap 3."""
    scheduler = DDPMSchedulerCustom(variance_type=variance_type)
    scheduler.set_timesteps(20)
    outputs = 2 if "learned" in variance_type else 1
    assert run_chain(scheduler, lambda x, t: network(x, t).repeat(1, outputs, 1, 1) - 0.5).isfinite().all()


def test_log_variances_are_the_same_variances():
    """Trap 3: σ² = β is σ² = β, however it is spelled."""
    for name in ("fixed_small", "fixed_large"):
        assert torch.equal(
            run_chain(DDPMSchedulerCustom(variance_type=name)),
            run_chain(DDPMSchedulerCustom(variance_type=name + "_log")),
        )


@pytest.mark.parametrize(("raw", "kind"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_range_spans_the_variances_of_the_skipped_step(raw, kind):
    """Trap 4."""
    learned, fixed = DDPMSchedulerCustom(variance_type="learned_range"), DDPMSchedulerCustom(variance_type=kind)
    x, eps, noise = torch.randn(3, 2, 3, 4, 4)
    for scheduler in (learned, fixed):
        scheduler.set_timesteps(10)
    for t in learned.timesteps:
        output = torch.cat([eps, torch.full_like(eps, raw)], dim=1)
        torch.testing.assert_close(
            learned.step(output, t, x, variance_noise=noise).prev_sample,
            fixed.step(eps, t, x, variance_noise=noise).prev_sample,
        )


def test_learned_range_chain_equals_the_stock_scheduler():
    """In the full chain the skipped step is the step, so here stock is right."""
    config = {"variance_type": "learned_range"}

    def predict(x, t):
        return torch.cat([network(x, t), torch.sin(3 * x)], dim=1)

    torch.testing.assert_close(
        run_chain(DDPMSchedulerCustom(**config), predict),
        run_chain(DDPMScheduler(**config), predict),
        rtol=0,
        atol=5e-4,
    )


def test_variances_under_diffusers_name():
    scheduler, stock = DDPMSchedulerCustom(), DDPMScheduler()
    for t in (1, 487, 999):
        for kind in ("fixed_small", "fixed_large"):
            torch.testing.assert_close(
                scheduler._get_variance(t, variance_type=kind).float(),
                stock._get_variance(t, variance_type=kind),
                rtol=1e-3,
                atol=0,
            )
        raw = torch.randn(2, 3, 4, 4)
        log_variance = stock._get_variance(t, raw, "learned_range")
        torch.testing.assert_close(
            scheduler._get_variance(t, raw, "learned_range").float(), log_variance.exp(), rtol=1e-3, atol=0
        )
    assert scheduler._get_variance(0) == 0


def test_learned_variance_is_a_logarithm():
    scheduler = DDPMSchedulerCustom(variance_type="learned")
    zero, noise, log_variance = torch.zeros(1, 1, 2, 2), torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2)
    x = scheduler.step(torch.cat([zero, log_variance], 1), 500, zero, variance_noise=noise).prev_sample
    torch.testing.assert_close(x, (0.5 * log_variance).exp() * noise)


def test_zero_terminal_snr_with_epsilon_is_refused_with_its_remedy():
    """Trap 8."""
    scheduler = DDPMSchedulerCustom(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="'epsilon'.*zero SNR.*v_prediction"):
        scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="'epsilon'.*zero SNR.*v_prediction"):
        scheduler.step(torch.randn(1, 1, 2, 2), 999, torch.randn(1, 1, 2, 2))
    good = DDPMSchedulerCustom(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert run_chain(good).isfinite().all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 100}, "never reach noise: ᾱ_T = 0.36.* 1000/100"),
        ({"num_train_timesteps": 500}, "never reach noise: ᾱ_T = 0.006"),
        ({"num_train_timesteps": 4000}, "too soon: ᾱ_T = .*1000/4000"),
    ],
)
def test_unsuitable_betas_cause_a_warning(config, message):
    """Trap 9."""
    with pytest.warns(UserWarning, match=message):
        DDPMSchedulerCustom(**config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.2},
        {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "sigmoid"},
    ],
)
def test_suitable_betas_cause_no_warning(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPMSchedulerCustom(**config)


def test_clipping_comes_before_the_mean():
    """Trap 12."""
    scheduler = DDPMSchedulerCustom()
    x, eps = torch.randn(2, 1, 3, 4, 4)
    output = scheduler.step(eps, 900, x, variance_noise=torch.zeros_like(x))
    assert output.pred_original_sample.abs().max() == 1
    mean = scheduler.process.q_posterior(output.pred_original_sample, x, 900).mean
    torch.testing.assert_close(output.prev_sample, mean)


# --- one step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_every_way_to_pass_the_timestep_gives_the_same_step(variance_type, eta):
    scheduler = DDPMSchedulerCustom(variance_type=variance_type)
    scheduler.set_timesteps(7, spacing="trailing")
    x, noise = torch.randn(2, 7, 3, 4, 4)
    output = torch.randn(7, 6 if variance_type == "learned_range" else 3, 4, 4)
    t = scheduler.timesteps
    together = scheduler.step(output, t, x, variance_noise=noise, ddim_eta=eta)
    for i in range(7):
        for alone in (int(t[i]), t[i], t[i : i + 1]):
            one = slice(i, i + 1)
            step = scheduler.step(output[one], alone, x[one], variance_noise=noise[one], ddim_eta=eta)
            torch.testing.assert_close(step.prev_sample, together.prev_sample[one], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(step.pred_original_sample, together.pred_original_sample[one])


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("timestep", ["int", "0-d", "per image"])
def test_step_is_one_graph_for_torch_compile(variance_type, timestep):
    scheduler = DDPMSchedulerCustom(variance_type=variance_type)
    scheduler.set_timesteps(10)
    x, noise = torch.randn(2, 2, 3, 4, 4)
    output = torch.randn(2, 6 if variance_type == "learned_range" else 3, 4, 4)
    t = {"int": 500, "0-d": torch.tensor(500), "per image": torch.tensor([500, 0])}[timestep]

    def step(output, t, x, noise):
        return scheduler.step(output, t, x, variance_noise=noise, return_dict=False)[0]

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(output, t, x, noise), step(output, t, x, noise), rtol=1e-6, atol=1e-6)

    def drawing_step(output, t, x):
        return scheduler.step(output, t, x, return_dict=False)[0]

    torch._dynamo.reset()
    assert torch.compile(drawing_step, fullgraph=True, backend="eager")(output, t, x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_keep_a_float32_trajectory(dtype):
    scheduler = DDPMSchedulerCustom()
    x = torch.randn(2, 3, 4, 4)
    eps = torch.randn(2, 3, 4, 4).to(dtype)
    g = [torch.Generator().manual_seed(0) for _ in range(3)]
    full = scheduler.step(eps.float(), 500, x, generator=g[0]).prev_sample
    assert torch.equal(scheduler.step(eps, 500, x, generator=g[1]).prev_sample, full)
    half = scheduler.step(eps, 500, x.to(dtype), generator=g[2])
    assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
    torch.testing.assert_close(half.prev_sample.float(), full, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_integers_are_timesteps_too(dtype):
    scheduler = DDPMSchedulerCustom()
    x, eps, noise = torch.randn(3, 2, 3, 4, 4)
    t = torch.tensor([3, 100])
    steps = [scheduler.step(eps, t.to(d), x, variance_noise=noise).prev_sample for d in (dtype, torch.long)]
    assert torch.equal(*steps)
    scheduler.set_timesteps(timesteps=np.array([100, 3], dtype=np.uint8))
    assert scheduler.timesteps.tolist() == [100, 3]


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("timestep", [500, torch.tensor([500, 3])])
def test_gradients_pass_through_a_step_also_after_sampling(variance_type, timestep):
    """What sampling keeps for the next step, under inference_mode too, is no obstacle to autograd."""
    scheduler = DDPMSchedulerCustom(variance_type=variance_type, clip_sample=False)
    x, noise = torch.randn(2, 2, 1, 2, 2, dtype=torch.float64)
    output = torch.randn(2, 2 if variance_type == "learned_range" else 1, 2, 2, dtype=torch.float64)
    with torch.inference_mode():
        scheduler.step(output, timestep, x)

    def step(output, x):
        return scheduler.step(output, timestep, x, variance_noise=noise).prev_sample

    assert torch.autograd.gradcheck(step, (output.requires_grad_(), x.requires_grad_()))


def test_eta_is_as_precise_as_the_rest():
    scheduler = DDPMSchedulerCustom()
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    std = scheduler.step(zero, 500, zero, variance_noise=one, ddim_eta=0.3).prev_sample
    expected = 0.3 * scheduler.process.posterior_coefficients(500)[2].sqrt()
    torch.testing.assert_close(std.squeeze(), expected, rtol=1e-13, atol=0)


def test_float64_chains_stay_float64():
    scheduler = DDPMSchedulerCustom()
    x, eps = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    step = scheduler.step(eps, 500, x, variance_noise=torch.zeros_like(x))
    exact = scheduler.process.p_mean_variance(eps, x, 500, clip=lambda x: x.clamp(-1, 1)).mean
    assert step.prev_sample.dtype == torch.float64
    torch.testing.assert_close(step.prev_sample, exact, rtol=1e-13, atol=1e-13)


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.fixture
def silence(caplog):
    """Fails where diffusers logs a warning; its loggers do not propagate by themselves."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


CONFIG = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    "stock",
    [
        DDPMScheduler,
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        UniPCMultistepScheduler,
    ],
)
def test_configurations_swap_both_ways_silently(stock, tmp_path, silence):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = DDPMSchedulerCustom.from_config(stock.from_config(CONFIG).config)
        back = stock.from_config(ours.config)
        stock.from_config(CONFIG).save_pretrained(tmp_path / "stock")
        loaded = DDPMSchedulerCustom.from_pretrained(tmp_path / "stock")
        loaded.save_pretrained(tmp_path / "ours")
        reloaded = stock.from_pretrained(tmp_path / "ours")
    for scheduler in (ours, back, loaded, reloaded):
        assert {k: scheduler.config[k] for k in CONFIG} == CONFIG


def test_defaults_are_those_of_the_stock_scheduler():
    ours, stock = dict(DDPMSchedulerCustom().config), dict(DDPMScheduler().config)
    ours.pop("_use_default_values")
    stock.pop("_use_default_values")
    assert ours == stock


@pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler])
def test_the_number_of_timesteps_survives_a_swap_however_it_was_passed(stock):
    """Of the stock schedulers' own swaps, those by position fall back to 1000."""
    assert len(DDPMSchedulerCustom.from_config(DDPMSchedulerCustom(20, beta_schedule="squaredcos_cap_v2").config)) == 20
    assert len(DDPMSchedulerCustom.from_config(stock(20, beta_schedule="squaredcos_cap_v2").config)) == 20
    assert len(stock.from_config(DDPMSchedulerCustom(20, beta_schedule="squaredcos_cap_v2").config)) == 20


def test_trained_betas_survive_saving_and_set_the_number_of_timesteps(tmp_path):
    scheduler = DDPMSchedulerCustom(trained_betas=np.array([0.1, 0.3]))
    assert len(scheduler) == scheduler.config.num_train_timesteps == 2
    scheduler.save_pretrained(tmp_path)
    for cls in (DDPMSchedulerCustom, DDPMScheduler):
        loaded = cls.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded.betas.double(), scheduler.betas, rtol=1e-7, atol=0)
        assert len(loaded) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps.*0"),
        ({"beta_start": -1.0}, "beta_start.*-1.0"),
        ({"beta_end": 2.0}, "beta_end.*2.0"),
        ({"beta_schedule": "exp"}, "beta_schedule.*'exp'.*'linear'"),
        ({"trained_betas": [0.1, 1.2]}, r"betas\[1\].*1.2"),
        ({"variance_type": "other"}, "variance_type.*'other'.*'fixed_small'"),
        ({"prediction_type": "noise"}, "prediction_type.*'noise'.*'epsilon'"),
        ({"timestep_spacing": "even"}, "timestep_spacing.*'even'.*'leading'"),
        ({"steps_offset": -1}, "steps_offset.*-1"),
        ({"clip_sample_range": 0.0}, "clip_sample_range.*0"),
        ({"sample_max_value": -1.0}, "sample_max_value.*-1"),
        ({"dynamic_thresholding_ratio": 1.5}, "dynamic_thresholding_ratio.*1.5"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "at least 2"),
    ],
)
def test_bad_configurations_are_refused_at_construction(config, message):
    with pytest.raises(ValueError, match=message):
        DDPMSchedulerCustom(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps.*0.*1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps.*1001"),
        ({"num_inference_steps": 2.5}, "num_inference_steps.*2.5"),
        ({}, "neither"),
        ({"num_inference_steps": 3, "timesteps": [2, 1, 0]}, "both"),
        ({"timesteps": []}, "non-empty"),
        ({"timesteps": [5.0, 2.0]}, "integers"),
        ({"timesteps": [1, 2]}, "1 to 2.*descend"),
        ({"timesteps": [5, 5, 0]}, "5 to 5.*duplicates"),
        ({"timesteps": [1000, 5]}, "1000.*T - 1 = 999"),
        ({"timesteps": [5, -1]}, "-1"),
        ({"timesteps": [5, [1]]}, "list of integers"),
        ({"timesteps": [5, 1], "spacing": "trailing"}, "spacing"),
        ({"num_inference_steps": 5, "spacing": "even"}, "timestep_spacing.*'even'"),
    ],
)
def test_bad_trajectories_are_refused_and_change_nothing(arguments, message):
    scheduler = DDPMSchedulerCustom()
    scheduler.set_timesteps(4)
    before = scheduler.timesteps
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps == 4
    assert not scheduler.custom_timesteps


def test_offset_beyond_the_last_timestep_is_refused():
    scheduler = DDPMSchedulerCustom(steps_offset=1)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="steps_offset.*1.*trailing"):
        scheduler.set_timesteps(1000)


def test_bad_steps_are_refused():
    scheduler = DDPMSchedulerCustom()
    x = torch.randn(2, 3, 4, 4)
    for t in (-1, 1000, torch.tensor(1000), torch.tensor([1000, 5]), torch.tensor([-1, 5])):
        with pytest.raises(ValueError, match="between 0 and 999|from 0 to 999"):
            scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="variance_noise"):
        scheduler.step(x, 5, x, variance_noise=torch.zeros(4, 4))
    zero_snr = DDPMSchedulerCustom(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero SNR"):
        zero_snr.step(x, torch.tensor([999, 998]), x)
    with pytest.raises(ValueError, match="one timestep for all, or 2"):
        scheduler.step(x, torch.tensor([1, 2, 3]), x)
    with pytest.raises(TypeError, match="integers"):
        scheduler.step(x, torch.tensor(0.5), x)
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(x, 5, x, ddim_eta=1.5)
    with pytest.raises(ValueError, match="need"):
        scheduler.step(torch.cat([x, x], 1), 5, x)


def test_tables_cached_in_inference_mode_serve_training_too():
    scheduler, x = DDPMSchedulerCustom(), torch.randn(2, 3, 4, 4)
    scheduler.set_timesteps(1000)
    with torch.inference_mode():
        scheduler.step(x, torch.tensor([999, 899]), x)
        scheduler.step(x, 998, x)
        scheduler.add_noise(x, x, 3)
    leaf = x.clone().requires_grad_()
    for t in (999, 998):
        scheduler.step(leaf, t, x).prev_sample.sum().backward()
    scheduler.step(leaf, torch.tensor([999, 899]), x).prev_sample.sum().backward()
    scheduler.add_noise(leaf, x, 3).sum().backward()
    assert leaf.grad is not None
