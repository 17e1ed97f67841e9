"""Restoration: exact posteriors where they are known, exact measurements, network calls, and what bad input gets."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_hf.diffusion.ddpm_few_steps import Calibration, fingerprint
from ddpm_hf.restoration import methods
from ddpm_hf.restoration.methods import METHODS, Problem, State, Step, resampling_order
from ddpm_hf.restoration.operators import Blur, Compose, Downsample, Grayscale, Inpaint
from ddpm_hf.restoration.restore import restore
from support.oracle import OracleUNet, exact_x_0_error, oracle_pipeline

pytestmark = pytest.mark.filterwarnings("ignore")
C = 0.3  # the variance of the data: x_0 ~ N(0, C I)
MASK = (torch.arange(16).reshape(4, 4) % 3) > 0


def calibrated_oracle(**options):
    pipe = oracle_pipeline(C, size=4, **options)
    error = exact_x_0_error(pipe.scheduler.process, C)
    fits = fingerprint(pipe.scheduler.process, pipe.scheduler.config)
    pipe.scheduler.set_calibration(Calibration(error, 0 * error, error, 0 * error, 16, fits))
    return pipe


def dense(operator):
    basis = torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)
    return operator.bind((1, 4, 4), dtype=torch.float64)(basis).reshape(16, -1).T


def exact_posterior(matrix, y, sigma):
    """Mean and covariance of x_0 given y = A x_0 + σ n."""
    seen = matrix.abs().sum(1) > 0
    A = matrix[seen]
    gain = C * A.T @ torch.linalg.pinv(C * A @ A.T + sigma**2 * torch.eye(len(A), dtype=torch.float64), rtol=1e-10)
    return gain @ y[seen], C * torch.eye(16, dtype=torch.float64) - C * gain @ A


def measure_gaussian(operator, sigma):
    """A measurement in units of [-1, 1], flat, and the same in [0, 1] as `restore` takes it."""
    torch.manual_seed(3)
    linear = operator.bind((1, 4, 4), dtype=torch.float64)
    y = linear(C**0.5 * torch.randn(1, 1, 4, 4, dtype=torch.float64))
    y = y + sigma * torch.randn(y.shape, dtype=torch.float64)
    return y.flatten(), (y + linear(torch.ones(1, 1, 4, 4, dtype=torch.float64))) / 2


@pytest.mark.slow
@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    "operator",
    [Inpaint(MASK), Downsample(2, "box"), Blur(torch.ones(2, 2)), Compose(Inpaint(MASK), Downsample(2, "box"))],
    ids=["inpaint", "box", "blur", "compose"],
)  # fmt: skip
def test_the_posterior_of_gaussian_data_is_exact(operator, noise_std, eta, steps):
    n, sigma = 3000, 2 * noise_std
    flat, y = measure_gaussian(operator, sigma)
    found = restore(
        calibrated_oracle(), y.expand(n, *y.shape[1:]).float(), operator, noise_std, method="posterior",
        num_inference_steps=steps, eta=eta,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    ).images.double().flatten(1)  # fmt: skip
    mean, covariance = exact_posterior(dense(operator), flat, sigma)
    variance = covariance.diagonal().clamp(min=0)
    # 3 standard errors, for the largest of 16 means: 4 of them; 1e-3 is what the discretisation may leave.
    assert ((found.mean(0) - mean).abs() <= 4 * (variance / n).sqrt() + 1e-3).all()
    error = ((variance[:, None] * variance[None] + covariance**2) / n).sqrt()
    assert ((torch.cov(found.T) - covariance).abs() <= 4.5 * error + 1e-3).all()
    assert float(torch.cov(found.T).trace() / covariance.trace()) == pytest.approx(1, abs=0.03)


def test_a_learned_variance_takes_the_place_of_a_calibration():
    """A variance above β̃ is doubt about x_0, which the posterior heeds and DDNM does not."""
    pipe = oracle_pipeline(C, size=4, raw_variance=0.0, variance_type="learned_range")  # between β̃ and β
    _, y = measure_gaussian(Inpaint(MASK), 0.0)
    found = restore(
        pipe, y.expand(1000, 1, 4, 4).float(), Inpaint(MASK), num_inference_steps=25, method="posterior",
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images.flatten(1)  # fmt: skip
    assert float(found[:, ~MASK.flatten()].var(0).mean()) == pytest.approx(C, rel=0.25)


def test_other_methods_lose_spread_at_few_steps():
    """The documented bias of the others, on data whose posterior is known."""
    _, y = measure_gaussian(Downsample(2, "box"), 0.0)
    covariance = exact_posterior(dense(Downsample(2, "box")), _, 0.0)[1]
    for method in ("mmps", "ddnm", "diffpir", "pigdm", "dps"):
        found = restore(
            calibrated_oracle(), y.expand(1000, *y.shape[1:]).float(), Downsample(2, "box"), num_inference_steps=25,
            method=method, generator=torch.Generator().manual_seed(7), output_type="latent",
        ).images.flatten(1)  # fmt: skip
        assert float(torch.cov(found.T).trace() / covariance.trace()) < 0.8, method


class CorrelatedOracle(OracleUNet):
    """E[ε | x_t] for x_0 ~ N(0, covariance), pixels that hang together."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        alpha_bar = self.alpha_bar[int(timestep.reshape(-1)[0])]
        noisy = alpha_bar * self.covariance + (1 - alpha_bar) * torch.eye(16, dtype=torch.float64)
        matrix = (1 - alpha_bar) ** 0.5 * torch.linalg.inv(noisy)
        return ((sample.flatten(1) @ matrix.to(sample.dtype)).reshape(sample.shape),)


def test_diffpir_does_not_magnify_the_noise_of_a_blurred_image():
    """Where ᾱ_t is near 0, as with the cosine schedule, only the range of images limits the inverse of a blur."""
    pipe = oracle_pipeline(0.3, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    truth = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 2 + 0.25
    blur = Blur.gaussian(1.0)
    y = blur(truth) + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    images = restore(
        pipe, y, blur, 0.05, method="diffpir", num_inference_steps=25, generator=torch.Generator().manual_seed(2)
    ).images
    assert (images - truth).square().mean().sqrt() < 0.3  # noise over the smallest singular value would be 5 and more


def correlated_posterior(noise_std):
    """A pipeline whose pixels hang together, a measurement of it, and the exact mean and covariance of x_0 given it."""
    pipe = oracle_pipeline(C, size=4)
    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs().double()
    line = torch.exp(-distance / 4)
    pipe.unet.__class__ = CorrelatedOracle
    pipe.unet.covariance, pipe.unet.alpha_bar = C * torch.kron(line, line), pipe.scheduler.process.alphas_cumprod
    flat, y = measure_gaussian(Inpaint(MASK), 2 * noise_std)
    A, seen = dense(Inpaint(MASK))[MASK.flatten()], flat[MASK.flatten()]
    gain = pipe.unet.covariance @ A.T
    gain = gain @ torch.linalg.inv(A @ gain + (2 * noise_std) ** 2 * torch.eye(len(A), dtype=torch.float64))
    return pipe, y.float(), gain @ seen, pipe.unet.covariance - gain @ A @ pipe.unet.covariance


@pytest.mark.slow
@pytest.mark.parametrize("steps", [25, 100])
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
@pytest.mark.parametrize("options", [{}, {"eta": 0.0, "solver_order": 2}], ids=["mean", "draws"])
def test_mmps_knows_the_posterior_of_pixels_that_hang_together(options, noise_std, steps, monkeypatch):
    """Its mean, where the noise is renewed, and with eta = 0 its covariance, too: at any number of steps."""
    monkeypatch.setattr(methods, "MMPS_ITERATIONS", 10)  # as many as pixels are measured: exact
    n = 1000
    pipe, y, mean, covariance = correlated_posterior(noise_std)
    found = restore(
        pipe, y.expand(n, 1, 4, 4), Inpaint(MASK), noise_std, num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0), output_type="latent", **options,
    ).images.double().flatten(1)  # fmt: skip
    variance = covariance.diagonal().clamp(min=0)
    assert ((found.mean(0) - mean).abs() <= 4 * (variance / n).sqrt() + 2e-3).all()
    if options:
        error = ((variance[:, None] * variance[None] + covariance**2) / n).sqrt()
        assert ((torch.cov(found.T) - covariance).abs() <= 4.5 * error + 2e-3).all()


def test_renewed_noise_leaves_less_spread_and_more_accuracy():
    """The documented trade of the default: nearer to the truth than draws from the posterior are."""
    pipe, y, mean, covariance = correlated_posterior(0.0)
    truth = mean + covariance.diagonal().clamp(min=0).sqrt()  # a standard deviation off, as truths are
    error, spread = {}, {}
    for eta in (None, 1.0, 0.0):
        found = restore(
            pipe, y.expand(200, 1, 4, 4), Inpaint(MASK), num_inference_steps=25, eta=eta,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images.double().flatten(1)  # fmt: skip
        error[eta], spread[eta] = float((found - truth).square().mean()), float(found.var(0).sum() / covariance.trace())
    assert error[None] < error[1.0] < error[0.0]
    assert spread[None] < spread[1.0] < spread[0.0]


def test_mmps_explains_a_measurement_no_worse_than_the_network_alone():
    """Also for a network whose Jacobian is far from a covariance, with which conjugate gradients diverge."""
    generator = torch.Generator().manual_seed(0)
    linear, better = Inpaint(MASK).bind((1, 4, 4)), 0
    step = Step(t=500, s=400, c_0=0.1, c_t=0.9, variance=0.0, alpha_bar_t=0.5, alpha_bar_s=0.7, x_0_error=None,
                extrapolation=0.0)  # fmt: skip
    for _ in range(20):
        matrix = torch.eye(16) + 0.25 * torch.randn(16, 16, generator=generator)

        def denoise(x_t, step, matrix=matrix):
            return (x_t.flatten(1) @ matrix).reshape(x_t.shape), 0.0

        x_t, y = torch.randn(2, 4, 1, 4, 4, generator=generator)
        problem = Problem(linear, linear(y), 0.0)
        _, mean = METHODS["mmps"](State(x_t, denoise, torch.zeros), step, problem)
        before, after = ((problem.y - linear(x)).flatten(1).norm(dim=1) for x in (denoise(x_t, step)[0], mean))
        assert (after <= before * (1 + 1e-5)).all()
        better += int((after < 0.99 * before).sum())
    assert better > 20


OPERATORS = [
    Inpaint(torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.5), Downsample(2), Downsample(4, "box"),
    Grayscale(), Blur.gaussian(0.7), Compose(Grayscale(), Downsample(2)), Compose(Blur.gaussian(0.6), Downsample(2)),
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "repaint"])
def test_exact_measurements_are_met_on_8_bit_output(make_unet, operator, method):
    pipe = DDPMPipeline(make_unet(), DDPMScheduler())  # stock, untrained: the worst of priors
    pipe.set_progress_bar_config(disable=True)
    truth = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(5)) / 255
    y = operator(truth)
    images = restore(pipe, y, operator, num_inference_steps=4, method=method).images
    assert images.min() >= 0
    assert images.max() <= 1
    assert (operator((images * 255).round() / 255) - y).abs().max() <= 1 / 255


@pytest.mark.parametrize(
    ("method", "calls"), [("mmps", 6), ("posterior", 6), ("ddnm", 6), ("diffpir", 6), ("pigdm", 6), ("dps", 6)]
)
def test_a_step_is_one_network_call(make_unet, method, calls):
    assert count_calls(make_unet(), method) == calls


def count_calls(unet, method, **options):
    made = []
    unet.register_forward_hook(lambda *_: made.append(1))
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    restore(pipe, torch.rand(1, 3, 8, 8), Inpaint(torch.ones(8, 8)), num_inference_steps=6, method=method, **options)
    return len(made)


def test_repaint_goes_back_and_forth(make_unet):
    order = resampling_order([5, 4, 3, 2, 1, 0], jump_length=2, num_resamples=3)
    down = [(t, s) for t, s in order if s < t]
    assert len(order) == len(down) + 4  # 2 parts are repeated twice, the last one ends at the image
    assert order[:3] == [(5, 4), (4, 3), (3, 5)]
    assert order[-2:] == [(1, 0), (0, -1)]
    assert count_calls(make_unet(), "repaint", jump_length=2, num_resamples=3) == len(down)


def test_an_image_depends_on_its_own_seed_and_mask_alone(make_unet):
    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    masks = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    y = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))

    def seeds(*numbers):
        return [torch.Generator().manual_seed(i) for i in numbers]

    together = restore(pipe, y, Inpaint(masks), num_inference_steps=4, generator=seeds(0, 1, 2)).images
    alone = restore(pipe, y[1:2], Inpaint(masks[1:2]), num_inference_steps=4, generator=seeds(1)).images
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=0)
    assert pipe.scheduler.timesteps.numel() == 1000  # the pipeline is as it was


def test_a_function_that_is_not_linear_is_followed_by_its_gradient(make_unet):
    """Overexposure: what is clipped is painted, the rest comes closer to the measurement than it was."""
    pipe = DDPMPipeline(make_unet(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    truth = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(4))

    def overexpose(x):
        return (1.5 * x).clamp(max=1)

    def distance(method_steps):
        images = restore(
            pipe, overexpose(truth), overexpose, method="dps", num_inference_steps=method_steps,
            generator=torch.Generator().manual_seed(0), output_type="latent",
        ).images  # fmt: skip
        return float((overexpose((images + 1) / 2) - overexpose(truth)).norm())

    assert distance(50) < 0.7 * distance(1)


BAD = [
    ({"measurement": torch.rand(1, 3, 4, 4)}, ValueError, r"`measurement` has shape \(3, 4, 4\).* makes \(3, 8, 8\)"),
    ({"measurement": torch.rand(1, 3, 8, 8) * 255}, ValueError, r"must hold images in \[0, 1\]: divide 8-bit"),
    ({"measurement": torch.randint(0, 255, (1, 3, 8, 8))}, ValueError, "must be a floating-point tensor"),
    ({"measurement": torch.full((1, 3, 8, 8), torch.nan)}, ValueError, "holds NaN or infinity"),
    ({"noise_std": -0.1}, ValueError, "`noise_std` is -0.1, but must be a number of at least 0"),
    ({"method": "magic"}, ValueError, "`method` is 'magic', but must be one of 'mmps', 'posterior'"),
    ({"method": "repaint", "operator": Grayscale()}, ValueError, "'repaint', but serves `Inpaint` only, not Grayscale"),
    ({"operator": Inpaint(torch.ones(2, 1, 8, 8))}, ValueError, "`mask` is for 2 images, but there are 1"),
    ({"operator": 3}, TypeError, "`operator` is a int, but must be an operator"),
    ({"generator": [torch.Generator()] * 2}, ValueError, "`generator` is a list of 2, but there are 1 measurements"),
    ({"method": "dps", "solver_order": 2}, ValueError, "`solver_order` is 2, but goes with"),
    ({"eta": 2}, ValueError, "`eta` is 2"),
    ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named_before_the_network_is_called(make_unet, change, error, message):
    unet = make_unet()
    unet.register_forward_hook(lambda *_: pytest.fail("the network was called"))
    arguments = {"measurement": torch.rand(1, 3, 8, 8), "operator": Inpaint(torch.ones(8, 8)), **change}
    with pytest.raises(error, match=message):
        restore(DDPMPipeline(unet, DDPMScheduler()), **arguments)


def test_ddnm_with_noise_needs_the_spectrum():
    operator = Compose(Blur(torch.ones(2, 2)), Downsample(2, "box"))
    with pytest.raises(ValueError, match="'ddnm' with noise needs the singular values"):
        restore(oracle_pipeline(C, size=4), torch.rand(1, 1, 2, 2), operator, 0.1, method="ddnm", num_inference_steps=2)
