"""The log of a run."""

import json
import math

import pytest
import torch
from accelerate import Accelerator

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.log import TrainingLog


def a_log(tmp_path, max_steps=100, **options):
    config = TrainConfig(dataset_name="digits", output_dir=str(tmp_path), report_to=["none"], **options)
    log = TrainingLog(Accelerator(cpu=True), config, max_steps)
    log.begin(0, [])
    return log


def entries(tmp_path):
    return [json.loads(line) for line in (tmp_path / "logs" / "train.jsonl").read_text().splitlines()]


YES, NO = torch.tensor(True), torch.tensor(False)


def test_the_log_has_the_mean_loss_overall_and_of_each_quarter_of_the_timesteps(tmp_path):
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


def test_only_a_streak_of_bad_gradients_ends_a_run(tmp_path):
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
        window(30, 0, 0, 1)  # the streak spans two windows, and is over when the log looks


def test_a_run_whose_last_gradient_is_bad_fails(tmp_path):
    log = a_log(tmp_path, max_steps=10)
    log.add_losses(torch.ones(1), torch.zeros(1, dtype=torch.long), 0.0)
    log.add_gradient(NO)
    with pytest.raises(FloatingPointError, match="1 gradients in a row"):
        log.write(10)
