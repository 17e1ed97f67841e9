"""Interrupted runs."""

import os
import signal
import sys

import pytest
from accelerate.state import AcceleratorState

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.distributed import Agreement
from ddpm_hf.storage.checkpoint import checkpoint_steps
from ddpm_hf.training.interruption import Interrupted, Interruption
from ddpm_hf.training.loop import train
from support.runs import TINY_OPTIONS, start, train_command, train_here, wait_for


def test_a_second_ctrl_c_exits_immediately():
    script = (
        "import time; from ddpm_hf.distributed import Agreement\n"
        "from ddpm_hf.training.interruption import Interruption\n"
        "with Interruption(Agreement(1)):\n    print('ready', flush=True)\n    while True: time.sleep(0.01)"
    )
    process = start([sys.executable, "-c", script])
    wait_for(process, b"ready")
    process.send_signal(signal.SIGINT)
    wait_for(process, b"Press Ctrl-C again to exit immediately.")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_waits_for_the_next_check(signum):
    with Interruption(Agreement(1)) as interruption:
        os.kill(os.getpid(), signum)
        with pytest.raises(Interrupted, match=signum.name):
            interruption.check()


@pytest.mark.slow
def test_ctrl_c_during_a_preview_saves_a_checkpoint_and_until_then_no_other_run_starts(tmp_path):
    slow = ["--ddpm_num_inference_steps", "1000", "--save_images_steps", "10", "--eval_batch_size", "200"]
    process = start(train_command(tmp_path, *slow), env={**os.environ, "TQDM_MININTERVAL": "0"})
    wait_for(process, b"Sampling")
    other = train_here(tmp_path, "--resume_from_checkpoint", "latest")
    assert other.returncode == 1
    assert "another run is writing into `output_dir`" in other.stderr
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert b"Stopped after 1 updates. Resume with --resume_from_checkpoint latest." in output
    assert b"Traceback" not in output
    assert checkpoint_steps(tmp_path) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_calibration_at_the_end_says_how_to_resume(signum, tmp_path):
    few = ["--ddpm_num_steps", "100", "--ddpm_beta_schedule", "squaredcos_cap_v2", "--max_train_steps", "4"]
    command = train_command(tmp_path, *few, "--calibration_images", "64")
    process = start(command, env={**os.environ, "TQDM_MININTERVAL": "0"})
    wait_for(process, b"Calibrating")
    process.send_signal(signum)
    output = process.communicate()[0].decode()
    assert process.returncode == 128 + signum
    assert "What was saved before is unharmed. Resume with --resume_from_checkpoint latest." in output
    assert "Traceback" not in output
    again = train_here(tmp_path, *few, "--calibration_images", "64", "--resume_from_checkpoint", "latest")
    assert again.returncode == 0, again.stderr
    assert "_calibration" in (tmp_path / "scheduler" / "scheduler_config.json").read_text("utf-8")


def test_a_failed_run_releases_its_folder_though_its_exception_is_kept(tmp_path):
    """As in a notebook, where the next cell resumes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {**TINY_OPTIONS, "output_dir": str(tmp_path), "max_train_steps": 10, "save_images_steps": 0}
    with pytest.raises(FloatingPointError) as kept:
        train(TrainConfig(**options, learning_rate=1e30))
    train(TrainConfig(**options, overwrite_output_dir=True))
    assert checkpoint_steps(tmp_path) == [10]
    assert kept.value.__traceback__ is not None
