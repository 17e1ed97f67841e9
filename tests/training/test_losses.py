"""Algorithm 1 and its losses, against the formulas of their papers."""

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import kstest
from torch.nn.functional import mse_loss

from ddpm_hf import DDPMProcess
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.diffusion.ddpm_process import make_betas
from ddpm_hf.training.losses import detach_mean, l_simple, loss_weight, target, training_losses, vlb


@pytest.fixture(scope="module")
def process():
    return DDPMProcess(make_betas())


def test_targets_are_what_the_predictions_mean(process):
    x_0, noise, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([3, 700])
    x_t = process.q_sample(x_0, t, noise)
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        goal = target(process, x_0, noise, t, prediction_type)
        torch.testing.assert_close(process.predict_x0(goal, x_t, t, prediction_type), x_0, rtol=1e-3, atol=1e-3)


def test_simple_loss_is_the_mean_square_per_image():
    a, b = torch.randn(2, 3, 2, 4, 4)
    torch.testing.assert_close(l_simple(a, b), torch.stack([mse_loss(a[i], b[i]) for i in range(3)]))


@pytest.mark.parametrize(
    ("weighting", "options", "of_x_0"),
    [
        ("snr", {}, lambda snr: snr),
        ("min_snr", {"snr_gamma": 0.5}, lambda snr: snr.clamp(max=0.5)),
        ("min_snr", {}, lambda snr: snr.clamp(max=5)),
        ("min_snr_v", {}, lambda snr: (snr + 1).clamp(max=5)),
        ("p2", {}, lambda snr: snr / (1 + snr)),
        ("p2", {"p2_gamma": 0.5, "p2_k": 2.0}, lambda snr: snr / (2 + snr) ** 0.5),
    ],
)
def test_weightings_mean_the_same_whatever_is_predicted(process, weighting, options, of_x_0):
    """Each is a weight of ‖x_0 - x̂_0‖²: SNR, min(SNR, γ), SNR / (k + SNR)^γ."""
    t = torch.tensor([0, 300, 900])
    x_0, noise, error = torch.randn(3, 3, 1, 4, 4).double()
    x_t = process.q_sample(x_0, t, noise)
    wrong_x_0 = x_0 + 0.1 * error
    wrong_noise = process.predict_eps(wrong_x_0, x_t, t, "sample")
    predictions = {
        "sample": wrong_x_0,
        "epsilon": wrong_noise,
        "v_prediction": process.velocity(wrong_x_0, wrong_noise, t),
    }
    expected = of_x_0(process.snr(t)) * (0.1 * error).square().flatten(1).mean(1)
    for kind, prediction in predictions.items():
        loss = (prediction - target(process, x_0, noise, t, kind)).square().flatten(1).mean(1)
        weight = loss_weight(process, t, kind, weighting, **options)
        torch.testing.assert_close(weight.double() * loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", ["uniform", "snr", "min_snr", "min_snr_v", "p2"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_weights_are_finite_up_to_zero_terminal_snr(kind, weighting):
    from ddpm_hf.diffusion.ddpm_process import rescale_zero_terminal_snr

    process = DDPMProcess(rescale_zero_terminal_snr(make_betas()))
    weight = loss_weight(process, torch.arange(1000), kind, weighting)
    assert weight.isfinite().all()
    if weighting == "uniform":
        assert (weight == 1).all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
def test_the_bound_is_the_sum_of_its_terms(process, variance_type):
    """T times one term, averaged over all t, is Σ_t L_t, with each term in bits/dim as in Eq. 5."""
    x_0 = (torch.randint(256, (1, 1, 2, 2)) / 127.5 - 1).expand(1000, -1, -1, -1)
    t = torch.arange(1000)
    x_t = process.q_sample(x_0, t, torch.randn_like(x_0))
    output = 0.5 * torch.randn(1000, 2 if variance_type == "learned_range" else 1, 2, 2)
    estimate = vlb(process, output, x_0, x_t, t, "epsilon", variance_type).double().mean()
    total = 0.0
    for i in range(1000):
        one = torch.tensor([i])
        p = process.p_mean_variance(
            output[i : i + 1].double(),
            x_t[i : i + 1].double(),
            one,
            prediction_type="epsilon",
            variance_type=variance_type,
        )
        x = x_0[:1].double()
        term = process.L_0(x, p) if i == 0 else process.L_t_minus_1(x, x_t[i : i + 1].double(), one, p)
        total += float(term)
    assert float(estimate) == pytest.approx(total, rel=1e-4)


def test_with_fixed_variance_the_bound_is_a_weighted_squared_error(process):
    """L_{t-1} - its least value = β² / (2 σ² α (1 - ᾱ)) ‖ε - ε̂‖² (Eq. 12)."""
    t = torch.tensor([1, 10, 500, 999])
    x_0, noise, error = torch.randn(3, 4, 1, 3, 3)
    x_0 = x_0.clamp(-1, 1)
    x_t = process.q_sample(x_0, t, noise)
    bound = vlb(process, noise + 0.3 * error, x_0, x_t, t, "epsilon", "fixed_small").double()
    beta, alpha_bar = process.beta(t), process.alpha_bar(t)
    sigma2 = beta * (1 - process.alpha_bar(t - 1)) / (1 - alpha_bar)
    weight = beta.square() / (2 * sigma2 * (1 - beta) * (1 - alpha_bar))
    expected = 1000 * weight * (0.3 * error).double().square().flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(bound, expected, rtol=1e-3, atol=1e-6)


def test_gradients_of_the_bound_are_finite_at_every_t(process):
    t = torch.arange(1000)
    x_0 = torch.randint(256, (1000, 1, 2, 2)) / 127.5 - 1
    x_t = process.q_sample(x_0, t, torch.randn_like(x_0))
    output = torch.randn(1000, 2, 2, 2, requires_grad=True)
    vlb(process, output, x_0, x_t, t, "epsilon", "learned_range").sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad[:, 1] != 0).any()


def test_hybrid_trains_the_variance_by_the_bound_and_the_mean_not(process):
    t = torch.tensor([5, 600])
    x_0, noise = torch.randn(2, 2, 1, 3, 3)
    x_t = process.q_sample(x_0, t, noise)
    output = torch.randn(2, 2, 3, 3, requires_grad=True)
    vlb(process, detach_mean(output), x_0, x_t, t, "epsilon", "learned_range").sum().backward()
    assert (output.grad[:, 0] == 0).all()
    assert (output.grad[:, 1] != 0).all()


# --- Algorithm 1, by hand: which flag does what to its loss ----------------------------------------------------------


class Network(torch.nn.Module):
    """Predicts w x in every channel and remembers what it saw."""

    def __init__(self, channels=1):
        super().__init__()
        self.w, self.channels = torch.nn.Parameter(torch.tensor(0.3)), channels

    def forward(self, x, t):
        self.x, self.t = x, t
        return SimpleNamespace(sample=(self.w * x).repeat(1, self.channels, 1, 1))


def losses_of(network, **options):
    process = DDPMProcess(make_betas())
    config = TrainConfig(dataset_name="digits", **options)
    x_0 = (torch.arange(64).reshape(16, 1, 2, 2) * 4) / 127.5 - 1
    torch.manual_seed(5)
    losses, t = training_losses(network, process, x_0, None, config)
    assert torch.equal(t, network.t)
    a = process.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
    noise = (network.x - a.sqrt() * x_0) / (1 - a).sqrt()
    output = network(network.x, t).sample
    return losses, SimpleNamespace(process=process, x_0=x_0, x_t=network.x, t=t, noise=noise, output=output, a=a)


def squared_errors(goal, prediction):
    return torch.stack([mse_loss(p, g) for p, g in zip(prediction, goal, strict=True)])


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_weighting": "uniform"},
        {"loss_weighting": "snr"},
        {"snr_gamma": 0.7},
        {"loss_weighting": "p2", "p2_gamma": 0.5, "p2_k": 2.0},
    ],
)
def test_every_flag_of_the_simple_loss_reaches_it(kind, options):
    losses, saw = losses_of(Network(), prediction_type=kind, **options)
    v = saw.a.sqrt() * saw.noise - (1 - saw.a).sqrt() * saw.x_0
    error = squared_errors({"epsilon": saw.noise, "sample": saw.x_0, "v_prediction": v}[kind], saw.output)
    snr = (saw.a / (1 - saw.a)).flatten()
    of_noise = {
        "snr": torch.ones_like(snr), "p2": (2 + snr) ** -0.5, None: (0.7 / snr).clamp(max=1)
    }  # fmt: skip
    if options.get("loss_weighting") == "uniform":
        expected = error
    else:
        of_prediction = {"epsilon": 1, "sample": snr, "v_prediction": snr / (1 + snr)}[kind]
        expected = of_noise[options.get("loss_weighting")] * of_prediction * error
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)


def test_stock_weights_of_x_0_are_the_default():
    losses, saw = losses_of(Network(), prediction_type="sample")
    snr = (saw.a / (1 - saw.a)).flatten()
    torch.testing.assert_close(losses, snr * squared_errors(saw.x_0, saw.output), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weight", [0.05, 0.5])
def test_the_hybrid_loss_is_the_simple_one_and_the_bound_which_leaves_the_mean_alone(weight):
    options = {"objective": "hybrid", "variance_type": "learned_range", "vlb_weight": weight}
    losses, saw = losses_of(network := Network(channels=2), **options)
    bound = vlb(saw.process, detach_mean(saw.output), saw.x_0, saw.x_t, saw.t, "epsilon", "learned_range")
    expected = squared_errors(saw.noise, saw.output[:, :1]) + weight * bound
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
    # By the chain rule the gradient is that of the parts, with nothing of the bound through the mean.
    (mine,) = torch.autograd.grad(losses.sum(), network.w, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), network.w, retain_graph=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    through_mean = vlb(saw.process, saw.output, saw.x_0, saw.x_t, saw.t, "epsilon", "learned_range")
    (other,) = torch.autograd.grad(
        (squared_errors(saw.noise, saw.output[:, :1]) + weight * through_mean).sum(), network.w
    )
    assert abs(float(other - mine)) > 0.01 * abs(float(mine))


def test_the_bound_alone_is_all_of_the_loss():
    losses, saw = losses_of(Network(), objective="vlb", variance_type="fixed_large")
    torch.testing.assert_close(losses, vlb(saw.process, saw.output, saw.x_0, saw.x_t, saw.t, "epsilon", "fixed_large"))


class Stub(torch.nn.Module):
    """Predicts 0 and remembers what it saw."""

    def forward(self, x, t):
        self.x, self.t = x, t
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_training_draws_gaussian_noise_at_uniform_times():
    process, net = DDPMProcess(make_betas()), Stub()
    torch.manual_seed(0)
    losses, t = training_losses(net, process, torch.zeros(4000, 1, 4, 4), None, TrainConfig(dataset_name="digits"))
    assert torch.equal(t, net.t)
    assert (t.min(), t.max()) == (0, 999)
    assert kstest(t.numpy() / 1000, "uniform").pvalue > 1e-3
    eps = net.x / process.one_minus_alpha_bar(t).sqrt().float().reshape(-1, 1, 1, 1)
    assert kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(losses, eps.square().flatten(1).mean(1), rtol=1e-4, atol=0)
