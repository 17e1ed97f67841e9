"""Evaluations by several processes, and such that are killed, end with the figures of one that was not."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from runs import ROOT, run
from test_evaluation import extractor, figures, save_model  # noqa: F401

from ddpm_hf.cli import main

OPTIONS = [
    "--dataset", "digits", "--num_images", "40", "--steps", "20", "--batch_size", "4", "--num_likelihood_images", "40",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def command(model, *options, launcher=(sys.executable,)):
    return [*launcher, str(ROOT / "training" / "evaluate.py"), str(model), *OPTIONS, *options]


def values(folder):
    return [(f["metric"], f["value"], f.get("standard_error"), f["num_images"]) for f in figures(folder)]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(make_unet, extractor, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = save_model(make_unet(channels=1), tmp_path / "model")
    options = ["--feature_extractor", str(extractor), "--cache_dir", str(tmp_path / "cache")]
    main(["evaluate", str(model), *OPTIONS, *options, "--output_dir", str(tmp_path / "whole")])
    broken = tmp_path / "broken"
    kept: dict[str, int] = {}
    for trace in ("evaluation/likelihood-*/*.json", "evaluation/samples-*/shards/*.npy"):
        process = subprocess.Popen(
            command(model, *options, "--output_dir", str(broken)), env=ENVIRONMENT, stderr=subprocess.DEVNULL
        )
        while len(list(broken.glob(trace))) < 2 and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, "it was to be killed in the middle"
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept |= {str(file): file.stat().st_mtime_ns for file in broken.glob("evaluation/likelihood-*/*.json")}
    shards = {file.name: np.load(file) for file in broken.glob("evaluation/samples-*/shards/*.npy")}
    main(["evaluate", str(model), *OPTIONS, *options, "--output_dir", str(broken)])
    assert figures(broken) == figures(tmp_path / "whole")
    for name in ("likelihood.json", "nearest.png"):
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    now = {str(file): file.stat().st_mtime_ns for file in broken.glob("evaluation/likelihood-*/*.json")}
    assert kept.items() <= now.items()
    (file,) = broken.glob("evaluation/samples-*/samples.npz")
    samples = np.load(file)["arr_0"]
    for name, images in shards.items():
        assert (samples[int(name.split(".")[0]) :][: len(images)] == images).all()


@pytest.mark.slow
def test_two_processes_find_what_one_does(make_unet, extractor, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    model = save_model(make_unet(channels=1), tmp_path / "model")
    options = ["--feature_extractor", str(extractor), "--cache_dir", str(tmp_path / "cache")]
    main(["evaluate", str(model), *OPTIONS, *options, "--output_dir", str(tmp_path / "one")])
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = run(command(model, *options, "--output_dir", str(tmp_path / "two"), launcher=torchrun), env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("The figures are in") == 1
    one, two = values(tmp_path / "one"), values(tmp_path / "two")
    assert [(name, count) for name, _, _, count in two] == [(name, count) for name, _, _, count in one]
    for (name, value, error, _), (_, other, other_error, _) in zip(one, two, strict=True):
        # Batches of the likelihood have other sizes, which changes the last bits of float32.
        assert other == pytest.approx(value, rel=1e-5 if name == "bpd" else 1e-9), name
        assert other_error == pytest.approx(error, rel=1e-4), name
    files = [next((tmp_path / name).glob("evaluation/samples-*/samples.npz")) for name in ("one", "two")]
    assert np.array_equal(*(np.load(file)["arr_0"] for file in files))
