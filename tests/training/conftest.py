import json
import os
import signal
import subprocess

import pytest

from support.runs import SUPPORT, TWO_PROCESSES, TWO_PROCESSES_ENV, start, train_here, wait_for


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The default job, made tiny: the same data, loop, EMA and pictures. The folder, and what was printed."""
    output_dir = tmp_path_factory.mktemp("run") / "digits"
    done = train_here(output_dir)
    assert done.returncode == 0, done.stderr
    return output_dir, done


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory):
    """The runs of support/two_processes.py by real gloo processes: their folder, what was printed, their options."""
    folder = tmp_path_factory.mktemp("two")
    options = ["--max_train_steps", "8", "--checkpointing_steps", "8", "--save_images_steps", "0"]
    options += ["--eval_steps", "8", "--eval_images", "17"]
    env = {**TWO_PROCESSES_ENV, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3"}  # which the flag overrides
    env["TQDM_MININTERVAL"] = "0"  # progress is printed at once
    command = [*TWO_PROCESSES, str(SUPPORT / "two_processes.py"), str(folder), json.dumps(options)]
    process = start(command, env=env)
    seen = wait_for(process, b"whole is done") + wait_for(process, b"Sampling")
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(children.split()[-1]), signal.SIGTERM)
    output = (seen + process.communicate()[0]).decode()
    assert process.returncode == 0, output
    return folder, output, options
