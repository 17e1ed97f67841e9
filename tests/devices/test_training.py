"""Training on a pretended GPU: the numbers of a CPU, no mix of devices, and no wait in an update."""

import pytest
import torch
from safetensors.torch import load_file

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import checkpoint_steps
from ddpm_hf.training import loop, step
from support.pretend_gpu import PretendGpu
from support.runs import TINY_OPTIONS

OBJECTIVES = {
    "simple": {},
    "conditional": {"label_column": "label"},
    "weighted": {"loss_weighting": "min_snr"},
    "v-prediction": {"prediction_type": "v_prediction"},
    "hybrid": {"objective": "hybrid", "variance_type": "learned_range"},
}


def train(output_dir, **options):
    """A run; the weights and the optimizer of its last checkpoint, by file and name."""
    calm = {"max_train_steps": 12, "checkpointing_steps": 100, "gradient_accumulation_steps": 1, "save_images_steps": 0}
    loop.train(TrainConfig(**{**TINY_OPTIONS, **calm, **options, "output_dir": str(output_dir)}))
    folder = output_dir / f"checkpoint-{checkpoint_steps(output_dir)[-1]}" / "training_state"
    return {
        (file, name): value
        for file in ("weights", "optimizer")
        for name, value in load_file(folder / f"{file}.safetensors").items()
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gpu_trains_what_a_cpu_trains_and_no_update_waits(tmp_path, objective):
    """Runs of 12 and of 18 updates log twice each, so more updates must not mean more waiting."""
    expected = train(tmp_path / "cpu", **OBJECTIVES[objective])
    waits = {}
    for updates in (12, 18):
        with PretendGpu() as gpu:
            actual = train(tmp_path / str(updates), max_train_steps=updates, **OBJECTIVES[objective])
        waits[updates] = gpu.waits
        assert not gpu.unsafe
        if updates == 12:
            assert_equal(actual, expected)
    assert waits[18] - waits[12] == {}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_apples_gpu_trains_what_a_cpu_trains_and_never_meets_float64(tmp_path, objective):
    expected = train(tmp_path / "cpu", **OBJECTIVES[objective])
    with PretendGpu("mps") as gpu:
        actual = train(tmp_path / "mps", **OBJECTIVES[objective])
    assert not gpu.unsafe
    if objective == "hybrid":  # the likelihood in float32
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    else:
        assert_equal(actual, expected)


# --- these tests can fail --------------------------------------------------------------------------------------------


def test_a_planted_wait_in_an_update_is_found(tmp_path, monkeypatch):
    augment = step.augment

    def waiting(batch, *arguments):
        x_0, labels = augment(batch, *arguments)
        return x_0 * float(x_0.abs().max() > 0), labels

    monkeypatch.setattr(step, "augment", waiting)
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        test_a_gpu_trains_what_a_cpu_trains_and_no_update_waits(tmp_path, "simple")
