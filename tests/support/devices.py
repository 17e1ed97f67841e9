"""Training runs in this process, to compare by device."""

import torch
from safetensors.torch import load_file

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import checkpoint_steps
from ddpm_hf.training import loop
from support.runs import TINY_OPTIONS


def train(output_dir, **options):
    """A run; the weights and the optimizer of its last checkpoint, by file and name."""
    calm = {
        "max_train_steps": 12, "checkpointing_steps": 100, "gradient_accumulation_steps": 1, "save_images_steps": 0,
        "calibration_images": 0,
    }  # fmt: skip
    loop.train(TrainConfig(**{**TINY_OPTIONS, **calm, **options, "output_dir": str(output_dir)}))
    folder = output_dir / f"checkpoint-{checkpoint_steps(output_dir)[-1]}" / "training_state"
    return {
        (file, name): value
        for file in ("weights", "optimizer")
        for name, value in load_file(folder / f"{file}.safetensors").items()
    }


def assert_equal(one, other):
    """All tensors of two runs are equal bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
