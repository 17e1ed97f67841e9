"""Validation during training: what is measured is what it is called."""

import json
import math
import re
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.pixels import to_uint8
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.distributed import Agreement
from ddpm_hf.evaluation.likelihood import bits_per_dim
from ddpm_hf.evaluation.metrics.distances import frechet_distance, moments
from ddpm_hf.evaluation.metrics.patch_features import PatchFeatures
from ddpm_hf.storage.checkpoint import best_step, checkpoint_steps
from ddpm_hf.training.copies import open_training_images
from ddpm_hf.training.interruption import Interrupted
from ddpm_hf.training.log import TrainingLog
from ddpm_hf.training.loop import train
from ddpm_hf.training.network import build_ema, build_unet
from ddpm_hf.training.plan import EVAL_CALLS, EVAL_SAMPLING_STEPS, Plan
from ddpm_hf.training.state import Run
from ddpm_hf.training.validation import Validation
from ddpm_hf.training.validation_set import make_validation_set
from support.runs import TINY_OPTIONS, train_here


def a_run(tmp_path, classes=None):
    config = TrainConfig(
        **{**TINY_OPTIONS, "output_dir": str(tmp_path), "max_train_steps": 1, "eval_steps": 1, "eval_images": 16}
    )
    unet = build_unet(config, classes)
    accelerator = Accelerator(cpu=True)
    plan, ema = Plan(config, 1781, 1), build_ema(config, unet)
    log = TrainingLog(accelerator, config, 1)
    log.begin(0, [])
    return Run(config, plan, DDPMSchedulerCustom(), accelerator, Agreement(1), unet, None, ema), log


@pytest.mark.parametrize("classes", [None, 10])
def test_what_is_logged_is_measured_on_the_exported_weights(classes, tmp_path):
    """The average differs from the raw weights here; what was measured is measured again by hand."""
    run, log = a_run(tmp_path, classes)
    for shadow in run.ema.shadow_params:
        shadow.mul_(0.5)
    images = load_images(TrainConfig(**TINY_OPTIONS, label_column="label" if classes else None))
    _, validation_set = make_validation_set(run.config, images, None)
    raw = [p.clone() for p in run.unet.parameters()]
    checks = []
    run.step = 1
    validation = Validation(run, log, validation_set)
    assert validation.measure(lambda: checks.append(1))
    assert len(checks) == EVAL_CALLS + EVAL_SAMPLING_STEPS  # one batch
    assert all(torch.equal(a, b) for a, b in zip(raw, run.unet.parameters(), strict=True))
    assert validation.measure(lambda: checks.append(1))  # known already
    assert len(checks) == EVAL_CALLS + EVAL_SAMPLING_STEPS
    (entry,) = log.validations()
    assert entry == json.loads((tmp_path / "logs" / "train.jsonl").read_text())

    run.ema.copy_to(run.unet.parameters())
    pipe = DDPMPipelineCustom(run.unet.eval(), DDPMSchedulerCustom())
    pipe.set_progress_bar_config(disable=True)
    bits = bits_per_dim(pipe, validation_set.pixels, calls_per_image=EVAL_CALLS, class_labels=validation_set.labels)
    assert entry["eval_bits_per_dim"] == bits.total
    assert entry["eval_bits_per_dim_se"] == bits.standard_error
    samples = pipe(
        16, [torch.Generator().manual_seed(i) for i in range(16)], EVAL_SAMPLING_STEPS, "latent", timesteps="linspace",
        eta=0.0, solver_order=2, class_labels=validation_set.labels,
    ).images  # fmt: skip
    features = PatchFeatures(validation_set.pixels)
    of_samples, of_seen, of_real = (
        moments(features(x)) for x in (to_uint8(samples), validation_set.seen, validation_set.pixels)
    )
    assert entry["eval_frechet"] == frechet_distance(of_samples, of_real)
    assert entry["eval_frechet_of_training_images"] == frechet_distance(of_seen, of_real)


def test_a_signal_ends_a_validation_without_a_trace(tmp_path):
    run, log = a_run(tmp_path)
    _, validation_set = make_validation_set(run.config, load_images(TrainConfig(**TINY_OPTIONS)), None)
    before = [p.clone() for p in run.unet.parameters()]
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == EVAL_CALLS + 3:  # among the samples
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        Validation(run, log, validation_set).measure(interrupt)
    assert log.validations() == []
    assert all(torch.equal(a, b) for a, b in zip(before, run.unet.parameters(), strict=True))
    assert run.unet.training
    Validation(run, log, validation_set).measure(lambda: None)
    Validation(run, other := TrainingLog(run.accelerator, run.config, 1), validation_set).measure(lambda: None)
    assert log.validations() == other.validations() != []


def test_the_best_is_the_smallest_finite_value_whose_checkpoint_exists(tmp_path):
    run, log = a_run(tmp_path)
    _, validation_set = make_validation_set(run.config, load_images(TrainConfig(**TINY_OPTIONS)), None)
    validation = Validation(run, log, validation_set)
    for step, bits, frechet in ((2, 1.0, 9.0), (4, 3.0, 1.0), (6, 2.0, 3.0), (8, float("nan"), float("nan"))):
        values = {"eval_bits_per_dim": bits, "eval_bits_per_dim_se": 0.1, "eval_frechet": frechet}
        log.write_validation(step, {**values, "eval_frechet_of_training_images": 0.5})
    for step in (4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    run.step = 8
    validation.record_best()
    assert best_step(tmp_path) == 6
    run.config.metric_for_best_model = "frechet"
    validation.record_best()
    record = json.loads((tmp_path / "best_checkpoint.json").read_text())
    assert (record["checkpoint"], record["metric_for_best_model"]) == ("checkpoint-4", "frechet")
    assert min(Image.open(tmp_path / "validation.png").size) > 300


def test_the_best_checkpoint_outlives_the_limit_and_is_exported_on_request(tmp_path, capsys):
    """A learning rate that ruins the network: the first checkpoint is the best."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {**TINY_OPTIONS, "lr_scheduler": "constant", "learning_rate": 0.3, "checkpoints_total_limit": 1}
    options |= {"max_train_steps": 9, "checkpointing_steps": 2, "ema_max_decay": 0.1}
    options |= {"eval_steps": 3, "eval_images": 16, "load_best_model_at_end": True, "save_images_steps": 0}
    train(TrainConfig(**options, output_dir=str(tmp_path)))
    assert best_step(tmp_path) == 3
    assert checkpoint_steps(tmp_path) == [3, 9]
    weights = "unet/diffusion_pytorch_model.safetensors"
    exported, best, last = (load_file(tmp_path / place / weights) for place in (".", "checkpoint-3", "checkpoint-9"))
    assert all(torch.equal(weight, best[name]) for name, weight in exported.items())
    assert any(not torch.equal(weight, last[name]) for name, weight in exported.items())
    assert f"best      {tmp_path}/checkpoint-3 by bits_per_dim: " in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "logs" / "train.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "eval_frechet" in e] == [3, 6, 9]


@pytest.mark.slow
def test_a_run_that_stops_improving_ends_exports_what_is_better_and_says_why(tmp_path):
    """A learning rate that ruins the network. Resumed, the run is over at once, with the same weights."""
    folder = tmp_path / "run"
    options = [
        "--learning_rate", "0.3", "--lr_scheduler", "constant", "--ema_max_decay", "0.1", "--max_train_steps", "400",
        "--checkpointing_steps", "400", "--save_images_steps", "0", "--eval_steps", "2", "--eval_images", "16",
        "--early_stopping_patience", "2", "--calibration_images", "0",
    ]  # fmt: skip
    done = train_here(folder, *options)
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in (folder / "logs" / "train.jsonl").read_text().splitlines()]
    bits = {e["step"]: e["eval_bits_per_dim"] for e in log if "eval_frechet" in e}
    best = min(bits, key=bits.get)
    assert list(bits)[-3:] == [best, best + 2, best + 4]
    reason = (
        f"Done: stopped early after {best + 4} of 400 updates: bits/dim of held-out images has not improved by "
        "0.1% for 2 validations. The "
    )
    assert reason in done.stdout
    assert reason in (folder / "report.html").read_text()
    copies = re.search(r"  copies    (\d+ of 16 samples copy a training image; of as many .*)\n", done.stdout)[1]
    assert f"| Copies | {copies} |" in (folder / "README.md").read_text()
    assert copies in (folder / "report.html").read_text()
    weights = "unet/diffusion_pytorch_model.safetensors"
    is_best = f"The best checkpoint, of update {best}, is exported" in done.stdout
    assert is_best or f"The last weights are exported: those of the best checkpoint, of update {best}," in done.stdout
    kept = f"checkpoint-{best if is_best else best + 4}"
    exported, of_kept = (load_file(folder / place / weights) for place in (".", kept))
    assert all(torch.equal(weight, of_kept[name]) for name, weight in exported.items())
    again = train_here(folder, *options, "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr
    reason = re.search(f"{re.escape(reason)}.*", done.stdout)[0].partition(". 0 min")[0]
    assert reason in again.stdout
    assert [json.loads(line) for line in (folder / "logs" / "train.jsonl").read_text().splitlines()] == log


@pytest.mark.parametrize(
    ("gain", "noise", "is_better"), [(0.1, 0.01, True), (0.1, 1.0, False), (0.01, 0.01, True), (math.nan, 0.01, True)]
)
def test_the_best_checkpoint_is_exported_only_where_it_is_better_beyond_chance(gain, noise, is_better, tmp_path):
    """With 16 images, two standard errors are half the deviation of the differences; images differ by much more."""
    run, log = a_run(tmp_path)
    _, validation_set = make_validation_set(run.config, load_images(TrainConfig(**TINY_OPTIONS)), None)
    validation = Validation(run, log, validation_set)
    of_images = 3 + torch.arange(16, dtype=torch.float64)
    differences = gain + noise * torch.tensor([1.0, -1.0]).double().repeat(8)
    run.step = 8
    for step, bits in ((4, of_images), (8, of_images + differences)):
        validation.bits[step] = bits.tolist()
        log.write_validation(step, {"eval_bits_per_dim": bits.mean().item(), "eval_frechet_of_training_images": 0.5})
        (tmp_path / f"checkpoint-{step}").mkdir()
    validation.record_best()
    resumed = Validation(run, log, validation_set)  # which has measured nothing itself
    resumed.record_best()
    for chooser in (validation, resumed):
        better, reason = chooser.choose()
        assert better == is_better
        assert ("may be chance" in reason) == (not is_better)
        assert "update 4" in reason
    resumed.bits.clear()
    assert resumed.choose() == (True, "The best checkpoint, of update 4, is exported.")


def test_copies_are_measured_on_the_samples_of_a_validation_and_on_held_out_images(tmp_path):
    run, log = a_run(tmp_path)
    images, validation_set = make_validation_set(run.config, load_images(TrainConfig(**TINY_OPTIONS)), None)
    held_out = validation_set._replace(pixels=torch.cat([validation_set.seen[:4], validation_set.pixels[4:]]))
    Validation(run, log, held_out, open_training_images(images, run.config)).measure(lambda: None)
    (entry,) = log.validations()
    assert entry["eval_copies"] == 0  # of a network that is not trained
    assert entry["eval_copies_of_held_out"] == 4 / 16


def test_gains_too_small_to_pay_for_do_not_prolong_a_run(tmp_path):
    run, log = a_run(tmp_path)
    _, validation_set = make_validation_set(run.config, load_images(TrainConfig(**TINY_OPTIONS)), None)
    validation = Validation(run, log, validation_set)
    run.config.early_stopping_patience, run.step = 3, 1
    stalled = []
    for step, bits in enumerate((9.0, 5.0, 4.0, 3.999, 4.1, 3.998, 3.0, 3.0, 3.0, float("nan"))):
        log.write_validation(step, {"eval_bits_per_dim": bits, "eval_frechet": 1.0})
        stalled.append(validation.has_stalled())
    assert stalled == [False] * 5 + [True] + [False] * 3 + [True]
    run.config.early_stopping_patience = None
    assert not validation.has_stalled()
