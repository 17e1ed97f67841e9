"""training/launch/slurm.sh, with stand-ins for SLURM that start its tasks as processes of this machine."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_hf.storage.checkpoint import checkpoint_steps, load_checkpoint
from support.launching import SMALL, node_env, start, start_ranks, succeed, wait_until
from support.runs import ROOT

SCRIPT = ROOT / "training" / "launch" / "slurm.sh"
STAND_INS = {
    # One task per node; signals are passed on; the highest status of a task is srun's.
    "srun": """
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
tasks = [subprocess.Popen(command) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda signum, frame: [task.send_signal(signum) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
""",
    "scontrol": """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\nanother-node")
elif sys.argv[1:3] == ["show", "job"]:
    print(f"JobId={sys.argv[3]} PreemptTime={os.environ['PREEMPT_TIME']}")
else:
    with open(os.environ["SCONTROL_LOG"], "a") as log:
        print(*sys.argv[1:], file=log)
""",
}


@pytest.fixture
def slurm(tmp_path):
    """Runs the script as job 7 on two nodes of one process each, like sbatch does."""
    for name, text in STAND_INS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!{sys.executable}{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    scontrol_log = tmp_path / "scontrol.log"
    scontrol_log.touch()

    def run(*options, attempt=0, preempt_time="None"):
        path = os.pathsep.join(map(str, (tmp_path / "bin", Path(sys.executable).parent, os.environ["PATH"])))
        env = {
            **node_env(tmp_path / "job"), "PATH": path, "SCONTROL_LOG": str(scontrol_log), "PREEMPT_TIME": preempt_time,
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "1", "SLURM_RESTART_COUNT": str(attempt),
        }  # fmt: skip
        return start(["bash", str(SCRIPT), *options], env, tmp_path / f"slurm-{attempt}.log")

    run.requests = lambda: scontrol_log.read_text().splitlines()
    return run


def stand_in_for_torchrun(tmp_path, text):
    (tmp_path / "bin" / "torchrun").write_text(f"#!/usr/bin/env bash\n{text}\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)


def test_the_script_is_sound():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_goes_back_into_the_queue_and_resumes_exactly(slurm, pictures, tmp_path):
    options = [*SMALL, "--train_data_dir", str(pictures), "--max_train_steps", "60", "--checkpointing_steps", "1000"]
    job = [*options, "--save_images_steps", "0", "--output_dir", str(tmp_path / "run")]
    first = slurm(*job)
    log = tmp_path / "run" / "logs" / "train.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size, [first])
    first.process.send_signal(signal.SIGUSR1)
    status, output = first.wait()
    assert status != 0
    step = max(checkpoint_steps(tmp_path / "run"))
    assert 10 <= step < 60
    assert f"Stopped after {step} updates" in output
    assert slurm.requests() == [f"requeue {os.getpid()}"]

    (output,) = succeed([slurm(*job, attempt=1)])
    assert f"Resuming from {tmp_path / 'run' / f'checkpoint-{step}'}" in output
    assert len(slurm.requests()) == 1  # a job that has finished is finished
    succeed(start_ranks(tmp_path, *options, "--save_images_steps", "0", "--output_dir", str(tmp_path / "calm")))
    mine, calm = (load_checkpoint(tmp_path / name / "checkpoint-60") for name in ("run", "calm"))
    for part in ("weights", "ema", "optimizer"):
        assert all(tensor.equal(getattr(calm, part)[name]) for name, tensor in getattr(mine, part).items())
    assert log.read_text() == (tmp_path / "calm" / "logs" / "train.jsonl").read_text()


@pytest.mark.parametrize(("preempt_time", "requeues"), [("2026-01-01T00:00:00", 1), ("None", 0)])
def test_a_preempted_job_goes_back_into_the_queue_and_a_failed_one_does_not(slurm, tmp_path, preempt_time, requeues):
    stand_in_for_torchrun(tmp_path, "exit 1")
    status, _ = slurm(preempt_time=preempt_time).wait()
    assert status == 1
    assert len(slurm.requests()) == requeues


def test_a_cancelled_job_waits_for_its_tasks_and_does_not_come_back(slurm, tmp_path):
    stand_in_for_torchrun(tmp_path, f"trap 'echo saved; exit 1' TERM; touch {tmp_path}/$$.started; sleep 600 & wait")
    job = slurm()
    wait_until(lambda: len(list(tmp_path.glob("*.started"))) == 2, [job])
    tasks = [int(file.stem) for file in tmp_path.glob("*.started")]
    job.process.terminate()
    assert job.is_running()
    for task in tasks:
        os.kill(task, signal.SIGTERM)
    status, output = job.wait()
    assert status == 1
    assert output.count("saved") == 2
    assert slurm.requests() == []
