"""One update: what it draws, what it computes, and that it is skipped without a finite gradient."""

import itertools
import json
import math

import pytest
import torch
from accelerate import Accelerator

from ddpm_hf import DDPMProcess
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import Batch, load_images
from ddpm_hf.data.pixels import normalize
from ddpm_hf.diffusion.ddpm_process import make_betas
from ddpm_hf.storage.checkpoint import load_checkpoint
from ddpm_hf.training.loop import train
from ddpm_hf.training.network import build_unet
from ddpm_hf.training.step import augment, seed_part, skip_unless_finite
from support.runs import TINY_UNET

CPU = torch.device("cpu")


def test_randomness_is_a_function_of_progress():
    draws = {}
    for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_part(*place)
        draws[place] = torch.randn(4)
        seed_part(*place)
        assert torch.equal(draws[place], torch.randn(4))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws.values(), 2))


def test_random_flip_mirrors_half_of_the_images():
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


def test_an_update_without_a_finite_gradient_changes_nothing():
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], lr=0.1, fused=True))

    def update(gradient):
        weight.grad = torch.full((3,), gradient)
        is_finite = skip_unless_finite(optimizer, weight.grad.norm(), accelerator)
        optimizer.step()
        return bool(is_finite)

    assert update(1.0)
    before = [weight.clone(), *(value.clone() for value in optimizer.state[weight].values())]
    for gradient in (math.nan, math.inf):
        assert not update(gradient)
        assert all(torch.equal(a, b) for a, b in zip(before, [weight, *optimizer.state[weight].values()], strict=True))
    assert update(1.0)
    assert not torch.equal(weight, before[0])


@pytest.mark.slow
def test_an_update_is_algorithm_1_then_clipping_then_adamw_then_ema(tmp_path):
    """Three updates of two micro-steps, written out by hand."""
    options = {
        "dataset_name": "digits", "resolution": 8, "channels": 1, "center_crop": True,
        "unet": {**TINY_UNET, "dropout": 0.0}, "prediction_type": "v_prediction", "train_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_train_steps": 3, "learning_rate": 1e-2, "lr_warmup_steps": 4,
        "max_grad_norm": 0.01, "use_ema": True, "ema_max_decay": 0.6, "ddpm_num_inference_steps": 2,
        "eval_batch_size": 1, "save_images_steps": 1, "report_to": ["none"], "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    config = TrainConfig(**options)
    mine = tmp_path / "run" / "scheduler" / "mine.txt"  # in a folder that no run has used, nothing is removed
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    train(config)
    assert mine.read_text() == "mine"
    state = load_checkpoint(tmp_path / "run" / "checkpoint-3")

    process, images = DDPMProcess(make_betas()), load_images(config, show_progress=False)
    torch.manual_seed(config.seed)
    unet = build_unet(config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = [p.detach().clone() for p in unet.parameters()]
    batches = images.batches(0, 4, 4, seed=0)
    for step in range(3):
        for micro_step in range(2):
            seed_part(0, step, micro_step)
            x_0 = normalize(next(batches).pixels)
            t = torch.randint(1000, (4,))
            noise = torch.randn_like(x_0)
            a = process.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
            v = a.sqrt() * noise - (1 - a).sqrt() * x_0
            prediction = unet(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t).sample
            (torch.nn.functional.mse_loss(prediction, v) / 2).backward()
        norm = torch.cat([p.grad.flatten() for p in unet.parameters()]).norm()
        assert norm > 0.01  # so that clipping matters
        for p in unet.parameters():
            p.grad *= 0.01 / norm
        optimizer.param_groups[0]["lr"] = (
            1e-2 * step / 4
        )  # as in diffusers, the first update is the zeroth of the warm-up
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.6, 1 - (1 + step) ** -0.75)  # diffusers' warm-up: 0 at the first update
        for mean, p in zip(average, unet.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - decay)
    # Adam and clipping forgive a wrong scale of the loss; the logged norm does not.
    log = json.loads((tmp_path / "run" / "logs" / "train.jsonl").read_text().splitlines()[-1])
    assert log["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    for (name, p), mean in zip(unet.named_parameters(), average, strict=True):
        torch.testing.assert_close(state.weights[name], p.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(state.ema[name], mean, rtol=1e-3, atol=1e-5)
