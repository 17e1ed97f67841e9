"""What version 0.1.0 has saved still loads, samples, resumes and is saved again."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from safetensors.torch import load_file

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.storage.checkpoint import load_checkpoint
from support.runs import ROOT, run, train_command

OLD = ROOT / "tests" / "fixtures" / "version_0_1_0"


def samples(pipe):
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(2, generators, num_inference_steps=10, output_type="pt", class_labels=[3, 7]).images


def load_by_our_package(folder):
    return DDPMPipelineCustom.from_pretrained(folder)


def load_as_remote_code(folder):
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)


@pytest.mark.parametrize("load", [load_by_our_package, load_as_remote_code])
def test_an_old_model_makes_the_images_it_made(load, tmp_path):
    expected = load_file(OLD / "expected" / "samples_seed_0_1.safetensors")["samples"]
    pipe = load(OLD / "run")
    torch.testing.assert_close(samples(pipe), expected, atol=1e-5, rtol=0)
    assert pipe.scheduler.config["_calibration"]
    pipe.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(samples(load_by_our_package(tmp_path / "again")), expected, atol=1e-5, rtol=0)


def test_stock_diffusers_loads_an_old_model():
    assert type(DDPMPipeline.from_pretrained(OLD / "run").scheduler).__name__ == "DDPMScheduler"


@pytest.mark.slow
def test_an_old_checkpoint_is_resumed(tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(OLD / "run", output_dir)
    before = json.loads((output_dir / "checkpoint-3" / "training_state" / "progress.json").read_text("utf-8"))["config"]
    options = ["--unet", json.dumps(before["unet"]), "--train_batch_size", str(before["train_batch_size"])]
    options += ["--gradient_accumulation_steps", str(before["gradient_accumulation_steps"])]
    options += ["--resolution", "8", "--label_column", "label", "--max_train_steps", "6"]
    options += ["--resume_from_checkpoint", "latest", "--calibration_images", "0"]
    done = run(train_command(output_dir, *options))
    assert done.returncode == 0, done.stderr
    expected = load_file(OLD / "expected" / "weights_after_6_updates.safetensors")
    found = load_checkpoint(output_dir / "checkpoint-6").weights
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=0)
