"""Evaluations by several processes, and interrupted ones, end with the results of one uninterrupted process."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ddpm_hf.cli import main
from support.evaluation import save_extractor, save_model, stored_results
from support.models import tiny_unet
from support.runs import ROOT, run

ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """What follows `evaluate` on the command line, but for the folder, and the folder of a run with it."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, extractor = save_model(tiny_unet(channels=1), folder / "model"), save_extractor(folder / "extractor")
    options = [
        str(model), "--dataset", "digits", "--num_images", "24", "--steps", "10", "--batch_size", "4",
        "--num_likelihood_images", "16", "--feature_extractor", str(extractor), "--cache_dir", str(folder / "cache"),
    ]  # fmt: skip
    main(["evaluate", *options, "--output_dir", str(folder / "whole")])
    return options, folder / "whole"


def script(options, output_dir, launcher=(sys.executable,)):
    return [*launcher, str(ROOT / "training" / "evaluate.py"), *options, "--output_dir", str(output_dir)]


def samples(folder):
    (file,) = folder.glob("evaluation/samples-*/samples.npz")
    return np.load(file)["arr_0"]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(evaluation, tmp_path):
    options, whole = evaluation
    parts, shards = "evaluation/likelihood-*/*.json", "evaluation/samples-*/shards/*.npy"
    measured = {}
    for trace in (parts, shards):
        process = subprocess.Popen(script(options, tmp_path), env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        while len(list(tmp_path.glob(trace))) < 2 and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it was to be killed in the middle"
        process.send_signal(signal.SIGKILL)
        process.wait()
        measured |= {file: file.stat().st_mtime_ns for file in tmp_path.glob(parts)}
    assert [f["metric"] for f in stored_results(tmp_path)] == ["bpd"]
    made = {int(file.stem): np.load(file) for file in tmp_path.glob(shards)}
    main(["evaluate", *options, "--output_dir", str(tmp_path)])
    assert stored_results(tmp_path) == stored_results(whole)
    for name in ("likelihood.json", "nearest.png"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert {file: file.stat().st_mtime_ns for file in measured} == measured
    assert np.array_equal(samples(tmp_path), samples(whole))
    assert all(np.array_equal(samples(tmp_path)[first:][: len(shard)], shard) for first, shard in made.items())


@pytest.mark.slow
def test_two_processes_find_what_one_does(evaluation, tmp_path):
    options, one = evaluation
    done = run(script(options, tmp_path, TORCHRUN), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The results are in") == 1
    assert np.array_equal(samples(tmp_path), samples(one))
    for result, expected in zip(stored_results(tmp_path), stored_results(one), strict=True):
        if result["metric"] == "bpd":  # in batches of other sizes, which changes the last bits of float32
            assert result["value"] == pytest.approx(expected["value"], rel=1e-5)
            assert result["standard_error"] == pytest.approx(expected["standard_error"], rel=1e-4)
            assert result["settings"] == expected["settings"]
        else:
            assert result == expected


@pytest.mark.slow
def test_processes_agree_on_what_is_missing(evaluation, tmp_path):
    """The other process sees no metrics.json, and would wait for the main one in every phase."""
    options, one = evaluation
    for rank in (0, 1):
        shutil.copytree(one, tmp_path / str(rank))
    (tmp_path / "1" / "metrics.json").unlink()
    (tmp_path / "evaluate.py").write_text(
        "import os, sys; from ddpm_hf.cli import main\n"
        "main(['evaluate', *sys.argv[1:-1], '--output_dir', os.path.join(sys.argv[-1], os.environ['RANK'])])\n"
    )
    done = run([*TORCHRUN, str(tmp_path / "evaluate.py"), *options, str(tmp_path)], env=ENVIRONMENT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert stored_results(tmp_path / "0") == stored_results(one)
