"""Averages by power functions, against their definition."""

import math

import numpy as np
import pytest
import torch

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import load_checkpoint
from ddpm_hf.training.averages import PowerFunctionEMA, build_averages, power_of_width
from ddpm_hf.training.network import build_unet
from support.runs import TINY_OPTIONS, train_here

UPDATES = 4000


def running_average(width, values):
    """Of these values, one after the other."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    ema = PowerFunctionEMA([weight], width, foreach=False)
    for value in values:
        weight.data.fill_(value)
        ema.step([weight])
    return float(ema.shadow_params[0])


@pytest.mark.parametrize("width", [0.03, 0.06, 0.12, 0.25])
def test_the_width_is_the_standard_deviation_of_what_is_averaged_in_parts_of_the_run(width):
    """A running average is linear: its averages of n and of n² are the moments of its profile."""
    n = np.arange(1, UPDATES + 1)
    gamma = power_of_width(width)
    mean, square = running_average(width, n / UPDATES), running_average(width, (n / UPDATES) ** 2)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)
    assert math.sqrt(square - mean**2) == pytest.approx(width, rel=0.01)


@pytest.mark.parametrize("width", [0.03, 0.2])
def test_a_constant_is_kept_and_the_initial_weights_are_forgotten(width):
    assert running_average(width, [5.0] * 10) == 5.0
    assert running_average(width, [1e6, *([5.0] * 3000)]) == pytest.approx(5.0, abs=0.1)


def test_it_is_the_weighted_mean_that_it_claims_to_be():
    """Σ k^γ θ_k / Σ k^γ, up to the discretisation of the integral."""
    values = np.random.default_rng(0).normal(size=UPDATES).cumsum()
    k = np.arange(1, UPDATES + 1) ** power_of_width(0.06)
    assert running_average(0.06, values) == pytest.approx(float((k * values).sum() / k.sum()), rel=5e-3)


@pytest.mark.parametrize("widths", [[0.0], [0.3], [0.1, 0.1], [-0.1]])
def test_impossible_widths_are_refused(widths):
    with pytest.raises(ValueError, match="ema_widths"):
        TrainConfig(dataset_name="digits", ema_widths=widths)


def test_the_middle_width_is_exported_unless_images_choose():
    config = TrainConfig(**TINY_OPTIONS, ema_widths=[0.12, 0.03, 0.06])
    exported, others = build_averages(config, build_unet(config))
    assert (exported.width, [ema.width for ema in others]) == (0.06, [0.03, 0.12])


def test_a_run_keeps_them_all_lets_held_out_images_choose_and_resumes_bit_for_bit(tmp_path):
    options = ["--use_ema", "--ema_widths", "0.03", "0.06", "0.2", "--eval_steps", "100", "--eval_images", "16"]
    options += ["--calibration_images", "0", "--save_images_steps", "0", "--lr_scheduler", "constant"]
    whole = train_here(tmp_path / "whole", *options, "--max_train_steps", "16", "--checkpointing_steps", "8")
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("The least is exported") == 1
    train_here(tmp_path / "parts", *options, "--max_train_steps", "8", "--checkpointing_steps", "6")
    # at 6, before images chose; the run is now to have 16 updates
    resumed = train_here(
        tmp_path / "parts", *options, "--max_train_steps", "16", "--checkpointing_steps", "8",
        "--resume_from_checkpoint", "checkpoint-6",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    one, two = (load_checkpoint(tmp_path / name / "checkpoint-16") for name in ("whole", "parts"))
    assert one.progress["ema_width"] == two.progress["ema_width"]
    kept = {float(name.partition("/")[0]) for name in one.averages} | {one.progress["ema_width"]}
    assert kept == {0.03, 0.06, 0.2}
    for name, value in one.averages.items():
        assert value.equal(two.averages[name]), name
    assert all(value.equal(two.ema[name]) for name, value in one.ema.items())
    assert any(not value.equal(one.weights[name]) for name, value in one.ema.items())
