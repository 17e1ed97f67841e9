"""A run that was ended at any moment, and gone on with, is the run that was not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from ddpm_hf.storage.checkpoint import checkpoint_steps, load_checkpoint
from support.runs import ROOT, SUPPORT, TINY_OPTIONS, TWO_PROCESSES, TWO_PROCESSES_ENV, run, train_command

STEPS = 30


def many_kills(output_dir, signals, seed=0):
    options = {**TINY_OPTIONS, "output_dir": str(output_dir), "max_train_steps": STEPS, "checkpointing_steps": 3}
    options |= {"eval_steps": 10, "eval_images": 16}
    done = run([sys.executable, str(SUPPORT / "many_kills.py"), json.dumps(options), str(signals), str(seed)])
    assert done.returncode == 0, done.stderr
    return [int(status) for status in re.findall(r"exit (-?\d+)", done.stdout)]


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
def test_ended_at_random_moments_and_resumed_is_as_if_never_ended(tmp_path):
    """Mid-epoch, with accumulation, flips, dropout and EMA; by SIGKILL, SIGTERM and Ctrl-C."""
    assert many_kills(tmp_path / "calm", signals=0) == [0]
    statuses = many_kills(tmp_path / "stormy", signals=7)
    assert set(statuses) <= {0} | {s for n in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) for s in (-n, 128 + n)}
    assert_same_end(tmp_path / "calm", tmp_path / "stormy", STEPS)
    left = sorted(p.name for p in (tmp_path / "stormy").iterdir())
    assert left == sorted(p.name for p in (tmp_path / "calm").iterdir())  # nothing half-written is left behind


def wait_for(process, text):
    """Read what a process prints, up to `text`."""
    seen = b""
    while text not in seen:
        chunk = os.read(process.stdout.fileno(), 4096)
        assert chunk, seen.decode()
        seen += chunk


def start(output_dir, *options, launcher=(), env=None):
    command = train_command(output_dir, *options, launcher=launcher)
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_ctrl_c_during_a_preview_saves_and_says_so_and_no_other_run_gets_in_between(tmp_path):
    process = start(
        tmp_path, "--ddpm_num_inference_steps", "1000", "--save_images_steps", "10", "--eval_batch_size", "200"
    )
    wait_for(process, b"Sampling")
    other = run(train_command(tmp_path, "--resume_from_checkpoint", "latest"))
    assert other.returncode == 1
    assert "another run is writing into `output_dir`" in other.stderr
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert b"Stopped after 1 updates. Resume with --resume_from_checkpoint latest." in output
    assert b"Traceback" not in output
    assert checkpoint_steps(tmp_path) == [1]


def test_a_second_ctrl_c_ends_at_once():
    script = (
        "import time; from ddpm_hf.distributed import Agreement\n"
        "from ddpm_hf.training.interruption import Interruption\n"
        "with Interruption(Agreement(1)):\n    print('ready', flush=True)\n    while True: time.sleep(0.01)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(process, b"ready")
    process.send_signal(signal.SIGINT)
    wait_for(process, b"Press Ctrl-C again to exit immediately.")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_two_processes_are_one_that_accumulates_twice_as_often(tmp_path):
    """Real gloo processes; and a signal to one of them ends both, to be resumed bit for bit."""
    options = ["--max_train_steps", "8", "--checkpointing_steps", "8", "--save_images_steps", "0"]
    options += ["--eval_steps", "8", "--eval_images", "17"]
    one = run(train_command(tmp_path / "one", *options, "--gradient_accumulation_steps", "4"))
    assert one.returncode == 0, one.stderr
    wrong_default = {**TWO_PROCESSES_ENV, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}  # the flag is the law
    two = run(train_command(tmp_path / "two", *options, launcher=TWO_PROCESSES), env=wrong_default)
    assert two.returncode == 0, two.stderr
    assert "updates of 16 images, on 2 × cpu" in two.stdout
    assert_same_end(tmp_path / "one", tmp_path / "two", 8, exactly=False)
    logs = [(tmp_path / name / "logs" / "train.jsonl").read_text() for name in ("one", "two")]
    trained, measured = zip(*(map(json.loads, log.splitlines()) for log in logs), strict=True)
    assert trained[0]["loss"] == pytest.approx(trained[1]["loss"], rel=1e-4)
    assert measured[0] == pytest.approx(measured[1], rel=1e-2)
    assert {"eval_bits_per_dim", "eval_bits_per_dim_se", "eval_frechet"} <= set(measured[0])

    # One of two is told to stop during a preview of both.
    slow = ["--save_images_steps", "30", "--ddpm_num_inference_steps", "1000"]
    process = start(tmp_path / "three", *options, *slow, launcher=TWO_PROCESSES, env=TWO_PROCESSES_ENV)
    wait_for(process, b"Sampling")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGTERM)
    output, _ = process.communicate()
    assert b"Stopped after 3 updates" in output
    assert checkpoint_steps(tmp_path / "three") == [3]
    resumed = [*options, "--resume_from_checkpoint", "latest"]
    shutil.copytree(tmp_path / "three", tmp_path / "alone")
    three = run(train_command(tmp_path / "three", *resumed, launcher=TWO_PROCESSES), env=TWO_PROCESSES_ENV)
    assert three.returncode == 0, three.stderr
    assert_same_end(tmp_path / "two", tmp_path / "three", 8)

    # And by one process alone, which says what that means.
    alone = run(train_command(tmp_path / "alone", *resumed))
    assert alone.returncode == 0, alone.stderr
    assert "Changed: 1 processes, 2 before; 8 images per update, 16 before." in alone.stdout
    assert load_checkpoint(tmp_path / "alone" / "checkpoint-8").progress["images_seen"] == 3 * 16 + 5 * 8


@pytest.mark.slow
def test_state_is_whole_where_processes_share_the_weights(tmp_path):
    script = str(SUPPORT / "sharded_run.py")
    done = run([*TWO_PROCESSES, script, str(tmp_path)], env=TWO_PROCESSES_ENV)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sharded and restored") == 2
    assert load_checkpoint(tmp_path / "checkpoint-3").weights["conv_in.weight"].shape == (8, 1, 3, 3)
