"""Training on a pretended GPU: the numbers of a CPU, no mix of devices, and no wait in an update."""

import json
from contextlib import nullcontext

import pytest
import torch

from ddpm_hf.storage.checkpoint import checkpoint_steps, read_progress
from ddpm_hf.training import step
from support.devices import assert_equal, train
from support.pretend_gpu import PretendGpu

OBJECTIVES = {
    "simple": {},
    "conditional": {"label_column": "label"},
    "weighted": {"loss_weighting": "min_snr"},
    "fp16": {"mixed_precision": "fp16"},
    "v-prediction": {"prediction_type": "v_prediction"},
    "hybrid": {"objective": "hybrid", "variance_type": "learned_range"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gpu_trains_what_a_cpu_trains_and_no_update_waits(tmp_path, objective):
    """Runs of 12 and of 18 updates log twice each, so more updates must not mean more waiting."""
    expected = train(tmp_path / "cpu", **{**OBJECTIVES[objective], "mixed_precision": "no"})
    waits = {}
    for updates in (12, 18):
        with PretendGpu() as gpu:
            actual = train(tmp_path / str(updates), max_train_steps=updates, **OBJECTIVES[objective])
        waits[updates] = gpu.waits
        assert not gpu.unsafe
        if updates == 12:
            assert_equal(actual, expected)
    assert waits[18] - waits[12] == {}


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "fp16"])
def test_apples_gpu_trains_what_a_cpu_trains_and_never_meets_float64(tmp_path, objective):
    expected = train(tmp_path / "cpu", **OBJECTIVES[objective])
    with PretendGpu("mps") as gpu:
        actual = train(tmp_path / "mps", **OBJECTIVES[objective])
    assert not gpu.unsafe
    if objective == "hybrid":  # the likelihood in float32
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    else:
        assert_equal(actual, expected)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_what_a_run_measures_and_shows_is_that_of_a_cpu(tmp_path, kind):
    """Validation, previews and the calibration of the exported model."""
    options = {"label_column": "label", "eval_steps": 4, "eval_images": 16, "save_images_steps": 4}
    options |= {"max_train_steps": 4, "ddpm_num_steps": 50, "ddpm_beta_schedule": "squaredcos_cap_v2"}
    options |= {"calibration_images": 16, "load_best_model_at_end": True}
    measured = []
    for device in ("cpu", kind):
        with PretendGpu(kind) if device == kind else nullcontext() as gpu:
            train(tmp_path / device, **options)
        config = json.loads((tmp_path / device / "scheduler" / "scheduler_config.json").read_text("utf-8"))
        best = json.loads((tmp_path / device / "best_checkpoint.json").read_text("utf-8"))
        values = [best[f"eval_{metric}"] for metric in ("bits_per_dim", "frechet")]
        measured.append(values + config["_calibration"]["x_0_error"])
    assert not gpu.unsafe
    assert measured[1] == pytest.approx(measured[0], rel=1e-4)
    preview, expected = ((tmp_path / d / "samples.png").read_bytes() for d in (kind, "cpu"))
    assert preview == expected


# --- these tests can fail --------------------------------------------------------------------------------------------


def test_a_planted_wait_in_an_update_is_found(tmp_path, monkeypatch):
    augment = step.augment

    def waiting(batch, *arguments):
        x_0, labels = augment(batch, *arguments)
        return x_0 * float(x_0.abs().max() > 0), labels

    monkeypatch.setattr(step, "augment", waiting)
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        test_a_gpu_trains_what_a_cpu_trains_and_no_update_waits(tmp_path, "simple")


# --- gradients that are not finite -----------------------------------------------------------------------------------


@pytest.fixture
def overflow(monkeypatch):
    """Makes the losses of some updates infinite."""
    losses_of = step.training_losses

    def at(*updates):
        done = iter(range(1, 1000))

        def training_losses(*arguments):
            losses, t = losses_of(*arguments)
            return (losses * float("inf") if next(done) in updates else losses), t

        monkeypatch.setattr(step, "training_losses", training_losses)

    return at


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_an_update_without_a_finite_gradient_is_skipped(tmp_path, overflow, kind):
    overflow(3, 4, 9)
    expected = train(tmp_path / "cpu")
    overflow(3, 4, 9)
    with PretendGpu(kind):
        actual = train(tmp_path / kind)
    assert_equal(actual, expected)
    assert all(value.isfinite().all() for value in actual.values())
    assert {float(value) for (_, name), value in actual.items() if name.endswith("/step")} == {9.0}
    assert '"gradients_not_finite"' in (tmp_path / kind / "logs" / "trouble.jsonl").read_text()


@pytest.mark.parametrize("overflows", [(12,), (3, 4, 8, 11, 12)], ids=str)
def test_overflows_of_fp16_cost_updates_and_neither_checkpoint_nor_export(tmp_path, overflow, overflows):
    """Also in an update that a checkpoint follows, and in the last one."""
    overflow(*overflows)
    options = {"mixed_precision": "fp16", "checkpointing_steps": 4, "checkpoints_total_limit": 0}
    with PretendGpu() as gpu:
        state = train(tmp_path, **options)
    assert checkpoint_steps(tmp_path) == [4, 8, 12]
    assert (tmp_path / "model_index.json").is_file()
    assert {float(value) for (_, name), value in state.items() if name.endswith("/step")} == {12.0 - len(overflows)}
    scaler = read_progress(tmp_path / "checkpoint-12")["grad_scaler"]
    assert scaler["scale"] == 2.0 ** (16 - len(overflows))
    assert not (tmp_path / "logs" / "trouble.jsonl").exists()  # the scaler still searches for its scale
    assert not gpu.unsafe


@pytest.mark.parametrize("resumed_at", [4, 8])
def test_fp16_resumes_bit_for_bit_after_overflows(tmp_path, overflow, resumed_at):
    overflows = (3, 4, 7, 12)
    options = {"mixed_precision": "fp16", "checkpointing_steps": 4, "checkpoints_total_limit": 0}
    overflow(*overflows)
    with PretendGpu():
        whole = train(tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / f"checkpoint-{resumed_at}"
    overflow(*(update - resumed_at for update in overflows))
    with PretendGpu():
        resumed = train(tmp_path / "resumed", resume_from_checkpoint=str(checkpoint), **options)
    assert_equal(whole, resumed)
    scalers = [read_progress(tmp_path / run / "checkpoint-12")["grad_scaler"] for run in ("whole", "resumed")]
    assert scalers[0] == scalers[1]


def test_fp16_that_overflows_without_being_scaled_up_ends_the_run(tmp_path, overflow):
    overflow(*range(5, 30))
    options = {"mixed_precision": "fp16", "checkpointing_steps": 4, "checkpoints_total_limit": 0}
    with PretendGpu(), pytest.raises(FloatingPointError, match="25 gradients in a row were not finite"):
        train(tmp_path, max_train_steps=29, **options)
    assert checkpoint_steps(tmp_path) == [4, 8, 12, 16, 20]  # after 21 updates the scale is 1/2


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms_are_not_replaced_by_the_fastest_ones(tmp_path, deterministic):
    before = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(deterministic)
    try:
        with PretendGpu():
            train(tmp_path, mixed_precision="bf16", max_train_steps=1)
        assert torch.backends.cudnn.benchmark is not deterministic
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before
