"""Evaluations by several processes, and interrupted ones, end with the results of one uninterrupted process."""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ddpm_hf.cli import main
from support.evaluation import save_extractor, save_model, stored_results
from support.measure_together import measure
from support.models import tiny_unet
from support.runs import ROOT, SUPPORT, TWO_PROCESSES, TWO_PROCESSES_ENV, run


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The arguments of `evaluate` but for --output_dir, and the folder of a run with them."""
    folder = tmp_path_factory.mktemp("evaluation")
    model, extractor = save_model(tiny_unet(channels=1), folder / "model"), save_extractor(folder / "extractor")
    options = [
        str(model), "--dataset", "digits", "--num_images", "24", "--steps", "10", "--batch_size", "4",
        "--num_likelihood_images", "16", "--feature_extractor", str(extractor), "--cache_dir", str(folder / "cache"),
    ]  # fmt: skip
    main(["evaluate", *options, "--output_dir", str(folder / "whole")])
    return options, folder / "whole"


def samples(folder):
    (file,) = folder.glob("evaluation/samples-*/samples.npz")
    return np.load(file)["arr_0"]


@pytest.mark.slow
def test_a_killed_evaluation_resumes_where_it_was(evaluation, tmp_path):
    options, whole = evaluation
    parts, shards = "evaluation/likelihood-*/*.json", "evaluation/samples-*/shards/*.npy"
    measured = {}
    for trace in (parts, shards):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "training" / "evaluate.py"), *options, "--output_dir", str(tmp_path)],
            env=TWO_PROCESSES_ENV,
            stderr=subprocess.DEVNULL,
        )
        while len(list(tmp_path.glob(trace))) < 2 and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it was killed"
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


@pytest.fixture(scope="module")
def two_processes(evaluation, tmp_path_factory):
    """The folder of what two processes have measured, and their output.

    They evaluate once into a shared folder, and once into folders of their own, of which the second lacks the results
    that the first has.
    """
    options, one = evaluation
    folder = tmp_path_factory.mktemp("two")
    for rank in (0, 1):
        shutil.copytree(one, folder / str(rank))
    (folder / "1" / "metrics.json").unlink()
    extractor = options[options.index("--feature_extractor") + 1]
    command = [*TWO_PROCESSES, str(SUPPORT / "measure_together.py"), str(folder), extractor, *options]
    done = run(command, env=TWO_PROCESSES_ENV, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes_find_what_one_does(evaluation, two_processes):
    (_, one), (folder, printed) = evaluation, two_processes
    assert printed.count(f"The results are in {folder / 'shared'}") == 1
    assert np.array_equal(samples(folder / "shared"), samples(one))
    for result, expected in zip(stored_results(folder / "shared"), stored_results(one), strict=True):
        if result["metric"] == "bpd":  # in batches of other sizes, which changes the last bits of float32
            assert result["value"] == pytest.approx(expected["value"], rel=1e-5)
            assert result["standard_error"] == pytest.approx(expected["standard_error"], rel=1e-4)
            assert result["settings"] == expected["settings"]
        else:
            assert result == expected


@pytest.mark.slow
def test_processes_agree_on_what_is_missing(evaluation, two_processes):
    """The other process sees no metrics.json, and would wait for the main one in every phase."""
    (_, one), (folder, _) = evaluation, two_processes
    assert stored_results(folder / "0") == stored_results(one)


@pytest.mark.slow
def test_two_processes_calibrate_measure_and_extract_as_one_does(evaluation, two_processes):
    (options, _), (folder, _) = evaluation, two_processes
    expected = measure(options[options.index("--feature_extractor") + 1])
    for process in (0, 1):
        count, found = torch.load(folder / f"measured-{process}", weights_only=True)
        assert count == 2
        for name in ("x_0_error", "bits"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=0)
        for name in ("features", "two features"):
            assert torch.equal(found[name], expected[name])
