"""Trouble is named as it happens, with a number and a remedy; runs that learn keep silent."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.training.losses import trivial_loss
from ddpm_hf.training.trouble import (
    in_average,
    in_copies,
    in_data,
    in_last_samples,
    in_log,
    in_samples,
    in_validations,
)  # fmt: skip
from support.runs import TINY_UNET, train_here

CONFIG = TrainConfig(dataset_name="digits", learning_rate=1e-3, lr_warmup_steps=0)
DIGITS = torch.from_numpy(np.rint(load_digits().images[:64, None] * (255 / 16)).astype(np.uint8))
# One micro-batch per update and no pictures: a hundred updates take a second or two.
FAST = ["--gradient_accumulation_steps", "1", "--save_images_steps", "0", "--calibration_images", "0"]
DIVERGING = [
    *FAST, "--learning_rate", "2", "--lr_scheduler", "constant", "--max_train_steps", "60",
    "--checkpointing_steps", "10",
]  # fmt: skip


def names(found):
    return [trouble.name for trouble in found]


def entries(*losses, lr=1e-3, **others):
    """Entries of ten updates each."""
    return [{"step": 10 * (i + 1), "loss": loss, "lr": lr, **others} for i, loss in enumerate(losses)]


def named(folder):
    """What a run has recorded: the update, and the trouble."""
    file = folder / "logs" / "trouble.jsonl"
    return {e["name"]: e for e in map(json.loads, file.read_text().splitlines())} if file.is_file() else {}


# --- rules, by histories that are known ---------------------------------------------------------------------


def falling(n, start=1.0, noise=0.2):
    """A loss that falls as a run's does, with so much chance in it."""
    rng = np.random.default_rng(0)
    return [(0.1 + start / (1 + i)) * float(np.exp(noise * rng.standard_normal())) for i in range(n)]


def test_a_loss_that_falls_is_no_trouble_at_any_time():
    history = entries(*falling(300))
    for i in range(1, len(history)):
        assert names(in_log(history[:i], CONFIG, 1.0, is_fp16=False)) == []


@pytest.mark.parametrize(
    ("losses", "name", "number"),
    [
        ([*falling(30), *[0.9 + 0.001 * i for i in range(10)]], "diverging", "is 0.905 at"),
        ([*falling(5), 12.0, 80.0, 900.0], "diverging", "80"),
        ([1.0 + 0.01 * (-1) ** i for i in range(30)], "stuck", "after 300 updates"),
    ],
)
def test_a_loss_that_rises_or_does_not_fall_is_named(losses, name, number):
    (trouble,) = in_log(entries(*losses), CONFIG, 1.0, is_fp16=False)
    assert trouble.name == name
    assert number in trouble.evidence
    assert "--learning_rate" in trouble.remedy


def test_a_loss_is_stuck_only_after_the_warm_up():
    history = entries(*[1.0] * 30)
    assert names(in_log(history[:19], CONFIG, 1.0, is_fp16=False)) == []
    late = TrainConfig(dataset_name="digits", lr_warmup_steps=301)
    assert names(in_log(history, late, 1.0, is_fp16=False)) == []
    assert names(in_log(history, CONFIG, None, is_fp16=False)) == []


def test_a_loss_that_turns_during_the_warm_up_names_the_rate_where_it_did():
    losses = [0.9 - 0.02 * min(i, 19) + 0.02 * max(0, i - 19) for i in range(40)]
    history = [{**e, "lr": 1e-4 * (i + 1)} for i, e in enumerate(entries(*losses))]
    (trouble,) = in_log(history, CONFIG, 1.0, is_fp16=False)
    assert trouble.name == "high_learning_rate"
    assert "from 0.002 to 0.004" in trouble.evidence
    assert trouble.remedy.endswith("--learning_rate 0.001.")


def test_gradients_that_grow_tenfold_explode():
    small = entries(*[0.1] * 30, grad_norm=0.2)
    assert names(in_log(small + [{**e, "step": e["step"] + 300} for e in small], CONFIG, 1.0, is_fp16=False)) == []
    large = [{**e, "step": e["step"] + 300, "grad_norm": 3.0} for e in small[:10]]
    (trouble,) = in_log(small + large, CONFIG, 1.0, is_fp16=False)
    assert (trouble.name, trouble.evidence) == (
        "exploding_gradients", "their norm was 0.2 at update 100 and is 3 at update 400",
    )  # fmt: skip


def test_a_loss_scaler_may_search_but_not_overflow_for_ever():
    searching = [{**e, "skipped": 10 * (i == 0)} for i, e in enumerate(entries(*falling(100)))]
    searching[60]["skipped"] = 1
    assert names(in_log(searching, CONFIG, 1.0, is_fp16=True)) == []
    overflowing = [{**e, "skipped": 1} for e in entries(*falling(100))]
    (trouble,) = in_log(overflowing, CONFIG, 1.0, is_fp16=True)
    assert trouble.name == "float16_overflows"
    assert "50 of the last 500 updates" in trouble.evidence
    assert "bf16" in trouble.remedy
    (trouble,) = in_log(searching[:1], CONFIG, 1.0, is_fp16=False)
    assert (trouble.name, trouble.evidence[:20]) == ("gradients_not_finite", "10 of the last 10 up")


def test_the_share_of_the_first_half_in_the_average_is_the_product_of_decays():
    """With decay 1 - 1/n the average is uniform, and one half of it is of the first half."""
    uniform = [{"step": n, "ema_decay": 1 - 1 / n} for n in range(1, 401)]
    (trouble,) = in_average(uniform)
    assert trouble.evidence.startswith("50% of it")
    every_tenth = uniform[9::10]
    (trouble,) = in_average(every_tenth)
    assert trouble.evidence.startswith(("50%", "51%"))
    warm_up = [{"step": n, "ema_decay": min(0.9999, 1 - (1 + n) ** -0.75)} for n in range(10, 5001, 10)]
    for n in range(10, 501):
        assert names(in_average(warm_up[:n])) == []


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_trivial_loss_is_what_a_network_of_zeros_has(prediction):
    from types import SimpleNamespace

    from ddpm_hf.data.pixels import normalize
    from ddpm_hf.training.losses import training_losses

    config = TrainConfig(dataset_name="digits", prediction_type=prediction, loss_weighting="min_snr")
    process, x_0 = DDPMSchedulerCustom().process, normalize(DIGITS).repeat(32, 1, 1, 1)
    losses, _ = training_losses(lambda x, t: SimpleNamespace(sample=torch.zeros_like(x)), process, x_0, None, config)
    expected = trivial_loss(process, config, float(x_0.square().mean()))
    assert float(losses.mean()) == pytest.approx(expected, rel=0.06)
    assert trivial_loss(process, TrainConfig(dataset_name="digits", objective="vlb"), 1.0) is None


def test_images_that_are_equal_narrow_or_few_are_named_and_good_ones_are_not():
    assert names(in_data(DIGITS, 1797)) == []
    assert names(in_data(DIGITS[:1].repeat(8, 1, 1, 1), 1797)) == ["equal_images"]
    (trouble,) = in_data((DIGITS > 100).to(torch.uint8), 1797)
    assert (trouble.name, trouble.evidence) == (
        "narrow_range", "those of 64 images lie between 0 and 1 of 0 to 255",
    )  # fmt: skip
    (trouble,) = in_data(DIGITS, 64)
    assert (trouble.name, trouble.evidence[:2]) == ("few_images", "64")


def test_samples_that_saturate_or_are_blank_are_named_and_real_images_are_not():
    assert names(in_samples(DIGITS[:32], DIGITS[32:])) == []
    gray = DIGITS // 2 + 60
    assert names(in_samples(gray[:32], gray[32:])) == []
    assert names(in_samples((gray > 100).to(torch.uint8) * 255, gray)) == ["saturated_samples"]
    assert names(in_samples(torch.full_like(gray, 130), gray)) == ["blank_samples"]


def test_samples_that_are_still_noise_are_named_and_rough_real_images_are_not():
    smooth = torch.nn.functional.interpolate(DIGITS.float(), scale_factor=2, mode="bilinear").to(torch.uint8)
    noise = torch.randint(0, 256, smooth.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    (trouble,) = in_last_samples(noise, smooth)
    assert "neighbouring pixels is 2.0 of their variance" in trouble.evidence
    assert names(in_last_samples(smooth[:32], smooth[32:])) == names(in_last_samples(DIGITS[:32], DIGITS[32:])) == []
    assert names(in_last_samples(noise[:32], noise[32:])) == []
    assert names(in_last_samples(torch.zeros_like(smooth), smooth)) == []
    assert names(in_last_samples(smooth // 2 + noise // 16, smooth)) == []


def test_overfitting_and_copies_are_named():
    good = [{"step": 10 * i, "eval_bits_per_dim": 5.0 - i % 2 * 0.01} for i in range(1, 20)]
    assert names(in_validations(good, CONFIG)) == []
    turning = [{"step": 10 * i, "eval_bits_per_dim": 4 + abs(i - 3) / 10} for i in range(1, 7)]
    assert names(in_validations(turning[:5], CONFIG)) == []
    (trouble,) = in_validations(turning, CONFIG)
    assert "was 4 after update 30 and is 4.3 after update 60" in trouble.evidence
    assert names(in_copies(9, 64, 0.0)) == ["copies"]
    assert names(in_copies(9, 64, 0.1)) == names(in_copies(0, 64, 0.0)) == names(in_copies(1, 4, 0.0)) == []


# --- real runs ----------------------------------------------------------------------------------------------


def test_a_learning_rate_of_ten_is_named_before_it_ends_the_run(tmp_path):
    done = train_here(tmp_path / "run", *FAST, "--learning_rate", "10", "--max_train_steps", "60")
    assert done.returncode == 1
    assert 0 < named(tmp_path / "run")["gradients_not_finite"]["step"] < 60
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Failed after 60 of 60 updates: " in page
    assert "gradients in a row were not finite" in page


@pytest.mark.slow
def test_a_loss_that_diverges_is_named_everywhere_and_a_resumed_run_remembers_it(tmp_path):
    options = [*DIVERGING, "--checkpoints_total_limit", "0"]
    done = train_here(tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    found = named(tmp_path / "run")
    assert found["diverging"]["step"] <= 60
    assert done.stdout.count("The loss diverges: ") == 2  # as it is found, and in the summary
    assert "  warning   The loss diverges: " in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<strong>The loss diverges</strong>" in page
    step = found["diverging"]["step"]
    assert f"Found after update {step}." in page
    before = (tmp_path / "run" / "logs" / "trouble.jsonl").read_text()
    for start in (step - 10, step):  # it is of another future, and of this one
        again = train_here(tmp_path / "run", *options, "--resume_from_checkpoint", f"checkpoint-{start}")
        assert again.returncode == 0, again.stderr
        assert (tmp_path / "run" / "logs" / "trouble.jsonl").read_text() == before
        assert again.stdout.count("The loss diverges: ") == (2 if start < step else 1)


def test_constant_images_are_named_before_the_first_update(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        Image.new("L", (16, 16), 1).save(folder / f"{i}.png")
    done = train_here(
        tmp_path / "run", *FAST, "--train_data_dir", str(folder), "--max_train_steps", "2", "--cache_dir",
        str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {name: e["step"] for name, e in named(tmp_path / "run").items()} == {"equal_images": 0, "few_images": 0}
    assert "Found before the first update." in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_run_that_learns_is_silent_and_so_is_its_page(tmp_path):
    unet = json.dumps({**TINY_UNET, "dropout": 0.0})
    options = ["--unet", unet, "--max_train_steps", "250", "--checkpointing_steps", "250", "--train_batch_size", "16"]
    done = train_here(tmp_path / "run", *FAST, *options, "--ddpm_num_inference_steps", "20")
    assert done.returncode == 0, done.stderr
    assert "Warning: " not in done.stdout + done.stderr
    assert named(tmp_path / "run") == {}
    assert '<div class="trouble">' not in (tmp_path / "run" / "report.html").read_text()
