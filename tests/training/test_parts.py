"""The parts of an update, by hand: which flag does what to the losses, the images, the labels and the log."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.nn.functional import mse_loss

from ddpm_hf import DDPMProcess
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import Batch
from ddpm_hf.diffusion.ddpm_process import make_betas
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.distributed import Agreement
from ddpm_hf.training.log import TrainingLog
from ddpm_hf.training.losses import detach_mean, training_losses, vlb
from ddpm_hf.training.network import build_ema, build_unet
from ddpm_hf.training.plan import Plan
from ddpm_hf.training.previews import sample_grids
from ddpm_hf.training.state import Run
from ddpm_hf.training.step import augment
from support.runs import TINY_OPTIONS

CPU = torch.device("cpu")


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


def test_half_of_the_images_are_mirrored_where_that_is_asked_for():
    pixels = torch.arange(2, dtype=torch.uint8).mul(255).reshape(1, 1, 1, 2).repeat(2000, 1, 1, 1)
    config = TrainConfig(dataset_name="digits", random_flip=True)
    x_0, labels = augment(Batch(pixels, None), config, None, CPU)
    assert labels is None
    mirrored = int((x_0[:, 0, 0, 0] == 1).sum())
    assert 800 < mirrored < 1200
    assert set(x_0.unique().tolist()) == {-1, 1}
    x_0, _ = augment(Batch(pixels, None), TrainConfig(dataset_name="digits"), None, CPU)
    assert (x_0[:, 0, 0, 0] == -1).all()


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_labels_are_dropped_to_the_null_label(share):
    config = TrainConfig(dataset_name="digits", label_column="label", label_dropout=share)
    labels = torch.arange(10).repeat(400)
    batch = Batch(torch.zeros(4000, 1, 1, 1, dtype=torch.uint8), labels)
    _, kept = augment(batch, config, 10, CPU)
    dropped = kept == 10
    assert abs(float(dropped.float().mean()) - share) < 0.03
    assert torch.equal(kept[~dropped], labels[~dropped])


# --- the log ---------------------------------------------------------------------------------------------------------


def a_log(tmp_path, max_steps=100, **options):
    config = TrainConfig(dataset_name="digits", output_dir=str(tmp_path), report_to=["none"], **options)
    log = TrainingLog(Accelerator(cpu=True), config, max_steps)
    log.begin(0, [])
    return log


def entries(tmp_path):
    return [json.loads(line) for line in (tmp_path / "logs" / "train.jsonl").read_text().splitlines()]


YES, NO = torch.tensor(True), torch.tensor(False)


def test_the_log_has_the_mean_loss_and_that_of_each_quarter_of_the_timesteps(tmp_path):
    log = a_log(tmp_path)
    log.add_losses(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 249, 250]), 0.0)
    log.add_gradient(YES)
    log.add_losses(torch.tensor([8.0, 32.0, math.nan]), torch.tensor([750, 999, 500]), 0.0)
    log.add_gradient(NO)
    log.write(10, lr=0.5)
    (entry,) = entries(tmp_path)
    assert entry == {
        "step": 10, "loss": 47 / 5, "loss_quarter_1": 1.5, "loss_quarter_2": 4.0, "loss_quarter_4": 20.0, "lr": 0.5,
        "skipped": 1,
    }  # fmt: skip


def test_only_a_streak_of_bad_gradients_ends_a_run_however_it_lies(tmp_path):
    log = a_log(tmp_path, max_skipped_steps=3)

    def window(step, *finite):
        for is_finite in finite:
            log.add_losses(torch.ones(1), torch.zeros(1, dtype=torch.long), 0.0)
            log.add_gradient(YES if is_finite else NO)
        log.write(step)

    window(10, 0, 0, 1, 0, 0, 1)  # four, but no three in a row
    assert not log.has_diverged()
    window(20, 1, 1, 0)
    assert log.has_diverged()
    with pytest.raises(FloatingPointError, match="3 gradients in a row.*--max_skipped_steps is 3.*update 30"):
        window(30, 0, 0, 1)  # over the border of two windows, and over again when it is looked at


def test_a_run_does_not_end_well_on_a_bad_gradient(tmp_path):
    log = a_log(tmp_path, max_steps=10)
    log.add_losses(torch.ones(1), torch.zeros(1, dtype=torch.long), 0.0)
    log.add_gradient(NO)
    with pytest.raises(FloatingPointError, match="1 gradients in a row"):
        log.write(10)


# --- previews --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [None, 10])
def test_previews_are_of_the_ema_and_of_the_raw_weights(classes, tmp_path):
    """With an average of zeros, the network predicts 0; the raw weights predict something else."""
    config = TrainConfig(**{**TINY_OPTIONS, "output_dir": str(tmp_path), "max_train_steps": 1})
    unet = build_unet(config, classes)
    accelerator = Accelerator(cpu=True)
    run = Run(
        config,
        Plan(config, 1797, 1),
        DDPMSchedulerCustom(),
        accelerator,
        Agreement(1),
        unet,
        None,
        build_ema(config, unet),
    )
    seen = []
    if classes:
        unet.class_embedding.register_forward_hook(lambda module, labels, output: seen.extend(labels[0].tolist()))
    for shadow in run.ema.shadow_params:
        shadow.zero_()
    checks = []
    grids = sample_grids(run, lambda: checks.append(1))
    assert grids.keys() == {"test_samples", "test_samples_raw"}
    assert len(checks) == 2 * config.ddpm_num_inference_steps
    again = sample_grids(run, lambda: None)
    assert grids["test_samples"].tobytes() == again["test_samples"].tobytes()
    assert grids["test_samples"].tobytes() != grids["test_samples_raw"].tobytes()
    for p in unet.parameters():
        p.data.zero_()
    assert sample_grids(run, lambda: None)["test_samples_raw"].tobytes() == grids["test_samples"].tobytes()
    if classes:
        assert set(seen) == {0, 1, 2, 3}
