"""An interrupted run resumes, and ends as if it had never been interrupted."""

import json
import re
import shutil
import signal
import sys

import pytest
import torch

from ddpm_hf.storage.checkpoint import checkpoint_steps, load_checkpoint
from support.runs import SUPPORT, TINY_OPTIONS, run, train_here

STEPS = 30


def assert_same_end(one, other, step, *, exactly=True):
    """Weights, EMA, optimizer, log and samples of two runs are the same."""
    mine, theirs = (load_checkpoint(folder / f"checkpoint-{step}") for folder in (one, other))
    for part in ("weights", "ema", "optimizer"):
        tensors, others = getattr(mine, part), getattr(theirs, part)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            if exactly:
                assert torch.equal(tensor, others[name]), name
            else:
                torch.testing.assert_close(tensor, others[name], rtol=1e-2, atol=2e-4)  # Adam amplifies rounding
    if exactly:
        files = ["logs/train.jsonl", "samples.png", "unet/diffusion_pytorch_model.safetensors"]
        files += [p.name for p in one.glob("best_checkpoint.json")]
        for name in files:
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.slow
def test_a_run_interrupted_at_random_moments_equals_an_uninterrupted_run(tmp_path):
    """Mid-epoch, with accumulation, flips, dropout and EMA; by SIGKILL, SIGTERM and Ctrl-C."""
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    options = {**TINY_OPTIONS, "max_train_steps": STEPS, "checkpointing_steps": 3, "eval_steps": 10, "eval_images": 16}
    done = run([sys.executable, str(SUPPORT / "many_kills.py"), json.dumps(options), str(calm), str(stormy), "7", "0"])
    assert done.returncode == 0, done.stderr
    first, *others, last = [int(status) for status in re.findall(r"exit (-?\d+)", done.stdout)]
    assert (first, last, len(others)) == (0, 0, 7), done.stderr
    assert set(others) <= {0} | {s for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) for s in (-n, 128 + n)}
    assert_same_end(calm, stormy, STEPS)
    assert sorted(p.name for p in stormy.iterdir()) == sorted(p.name for p in calm.iterdir())  # nothing half-written


@pytest.mark.slow
def test_a_resumed_run_makes_up_for_what_a_kill_left_undone_after_a_checkpoint(finished_run, tmp_path):
    """Killed between the last checkpoint and the export; and before that, a preview was due and not made."""
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    reference = (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name in ("unet", "scheduler"):
        shutil.rmtree(output_dir / name)
    (output_dir / "model_index.json").unlink()
    moved = tmp_path / "bigger disk"  # and its owner has moved a checkpoint away, which goes when its time comes
    (output_dir / "checkpoint-8").rename(moved)
    (output_dir / "checkpoint-8").symlink_to(moved)
    done = train_here(output_dir, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == reference
    longer = ["--resume_from_checkpoint", "latest", "--max_train_steps", "16"]
    done = train_here(output_dir, *longer)
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(output_dir) == [12, 16]


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates_twice_as_often(two_processes, tmp_path):
    folder, output, options = two_processes
    one = train_here(tmp_path, *options, "--gradient_accumulation_steps", "4")
    assert one.returncode == 0, one.stderr
    assert "updates of 16 images, on 2 × cpu" in output
    assert_same_end(tmp_path, folder / "whole", 8, exactly=False)
    logs = [(run / "logs" / "train.jsonl").read_text() for run in (tmp_path, folder / "whole")]
    trained, measured = zip(*(map(json.loads, log.splitlines()) for log in logs), strict=True)
    assert trained[0]["loss"] == pytest.approx(trained[1]["loss"], rel=1e-4)
    assert measured[0] == pytest.approx(measured[1], rel=1e-2)
    assert {"eval_bits_per_dim", "eval_bits_per_dim_se", "eval_frechet"} <= set(measured[0])


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_which_resume_bit_for_bit(two_processes):
    folder, output, _ = two_processes
    assert "Stopped after 3 updates" in output
    assert checkpoint_steps(folder / "alone") == [3]  # copied at that moment
    assert_same_end(folder / "whole", folder / "stopped", 8)


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two_and_reports_what_that_changes(two_processes):
    folder, _, options = two_processes
    alone = train_here(folder / "alone", *options, "--resume_from_checkpoint", "latest")
    assert alone.returncode == 0, alone.stderr
    assert "Changed: 1 processes, 2 before; 8 images per update, 16 before." in alone.stdout
    assert load_checkpoint(folder / "alone" / "checkpoint-8").progress["images_seen"] == 3 * 16 + 5 * 8
