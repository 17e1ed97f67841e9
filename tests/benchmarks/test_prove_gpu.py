"""The one command that proves a machine, in a dry run on the CPU."""

import json
import subprocess
import sys

import pytest

from support.runs import ROOT

sys.path.insert(0, str(ROOT / "training" / "benchmarks"))
import prove_gpu

SCRIPT = ROOT / "training" / "benchmarks" / "prove_gpu.py"


def prove(file, *options):
    """Its exit status, and what it wrote."""
    command = [sys.executable, str(SCRIPT), "--dry_run", "--output", str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(file.read_text("utf-8")), done.stdout + done.stderr


@pytest.mark.slow
def test_every_part_passes_in_a_dry_run_and_writes_its_figures(tmp_path):
    status, results, output = prove(tmp_path / "gpu.json", "--seconds", "1800")
    assert list(results) == list(prove_gpu.PARTS)
    assert [name for name, result in results.items() if result["ok"] is not True] == [], output[-3000:]
    assert status == 0
    batches = {row["batch"] for row in results["sampling_speed"]["rows"]}
    assert len(batches) > 1
    for row in results["sampling_speed"]["rows"] + results["training_speed"]["rows"]:
        assert row["mfu"] > 0


def test_what_no_time_is_left_for_is_skipped_and_no_failure(tmp_path):
    status, results, _ = prove(tmp_path / "gpu.json", "--seconds", "1", "--only", "machine", "sampling_speed")
    assert status == 0
    assert [result["ok"] for result in results.values()] == [None, None]


def test_a_part_that_hangs_costs_its_own_result_alone():
    result = prove_gpu.run_apart("machine", dry_run=True, seconds=0.1)
    assert result == {"ok": False, "error": "given up after 0 s"}


def test_a_wrong_step_fails_its_part(monkeypatch):
    from common import gpu_checks

    step = gpu_checks.DDPMSchedulerCustom.step

    def wrong_by_index(self, output, t, *arguments, **options):
        x, x_0 = step(self, output, t, *arguments, **options)
        return (x * 1.001 if isinstance(t, int) else x), x_0

    monkeypatch.setattr(gpu_checks.DDPMSchedulerCustom, "step", wrong_by_index)
    assert prove_gpu.run_part("steps_equal_those_of_a_cpu", dry_run=True)["ok"] is False


def test_an_exception_is_a_failure_with_its_place(monkeypatch):
    from common import gpu_checks

    def broken(trial):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_checks, "machine", broken)
    result = prove_gpu.run_part("machine", dry_run=True)
    assert result["ok"] is False
    assert "illegal memory access" in result["error"]
    assert "broken" in result["at"]
