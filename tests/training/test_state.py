"""A run, its checkpoint, and the run that resumes it."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.distributed import Agreement
from ddpm_hf.storage.checkpoint import checkpoint_steps, load_checkpoint
from ddpm_hf.training.network import build_ema, build_unet
from ddpm_hf.training.plan import Plan
from ddpm_hf.training.state import Run, compare, restore
from support.runs import train_here


def test_a_resumed_optimizer_has_its_moments_and_the_current_options(finished_run):
    checkpoint = finished_run[0] / "checkpoint-12"
    state = load_checkpoint(checkpoint)
    config = TrainConfig(**{**state.progress["config"], "adam_weight_decay": 0.5, "gradient_accumulation_steps": 1})
    accelerator = Accelerator(cpu=True)
    unet = build_unet(config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0, weight_decay=config.adam_weight_decay)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    plan, ema = Plan(config, 1797, 1, 12, 96), build_ema(config, unet)
    run = Run(config, plan, DDPMSchedulerCustom(), accelerator, Agreement(1), unet, optimizer, ema)
    assert compare(checkpoint, state.progress, config, plan, None) == [
        "Changed: gradient_accumulation_steps is 1, was 2.", "Changed: adam_weight_decay is 0.5, was 0.0001."
    ]  # fmt: skip
    with pytest.raises(ValueError, match="labels None, but the data has"):
        compare(checkpoint, state.progress, config, plan, ["cat", "dog"])
    restore(run, checkpoint)
    assert (run.step, run.images_seen) == (12, 12 * 8)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 1.0
    for (name, weight), shadow in zip(unet.named_parameters(), run.ema.shadow_params, strict=True):
        assert torch.equal(weight, state.weights[name])
        assert torch.equal(shadow, state.ema[name])
        for key, value in optimizer.optimizer.state[weight].items():
            assert torch.equal(value, state.optimizer[f"{name}/{key}"])


@pytest.mark.slow
def test_other_options_are_reported_or_refused(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    resume = ["--resume_from_checkpoint", "latest"]
    done = train_here(output_dir, *resume, "--prediction_type", "epsilon")
    assert done.returncode == 1
    assert "`prediction_type` is 'epsilon', but was 'v_prediction'" in done.stderr
    done = train_here(output_dir, *resume, "--max_train_steps", "6")
    assert "has 12 updates done, but the run ends after 6: raise --max_train_steps" in done.stderr
    # A damaged checkpoint is named, set aside and never counted as one to keep; a cut-off log line is no obstacle.
    weights = output_dir / "checkpoint-12" / "training_state" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    log = output_dir / "logs" / "train.jsonl"
    log.write_text(log.read_text()[:-5])
    flags = ["--max_train_steps", "9", "--checkpoints_total_limit", "1", "--adam_weight_decay", "0.5"]
    done = train_here(output_dir, *resume, *flags)
    assert done.returncode == 0, done.stderr
    assert "weights.safetensors differs from its hash" in done.stdout
    assert "Changed: adam_weight_decay is 0.5, was 0.0001." in done.stdout
    assert checkpoint_steps(output_dir) == [9]
    assert (output_dir / "checkpoint-12.abandoned").is_dir()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [9]


@pytest.mark.slow
def test_a_checkpoint_is_unsharded_where_processes_share_the_weights(two_processes):
    folder, output, _ = two_processes
    assert output.count("sharded and restored") == 2
    assert load_checkpoint(folder / "sharded" / "checkpoint-3").weights["conv_in.weight"].shape == (8, 1, 3, 3)
