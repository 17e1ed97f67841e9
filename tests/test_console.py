"""What a command prints beside its result: progress, and nothing that helps nobody."""

import json
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from ddpm_hf import progress
from support.models import tiny_unet
from support.runs import run

DDPM_HF = (sys.executable, "-m", "ddpm_hf")
SAMPLE = ("--num_images", "2", "--steps", "4", "--output_dir")


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """A model as the first ones on the Hub are: pickled weights, and keys that schedulers no longer have."""
    folder = tmp_path_factory.mktemp("console") / "old"
    DDPMPipeline(tiny_unet(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    config = folder / "scheduler" / "scheduler_config.json"
    old = {"timestep_values": None, "tensor_format": "pt"}
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), **old}), "utf-8")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sampling_prints_its_result_and_a_line_of_progress(oldest, tmp_path, dtype):
    done = run([*DDPM_HF, "sample", str(oldest), *SAMPLE, str(tmp_path / "out"), "--dtype", dtype, "--device", "cpu"])
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"2 images are in {tmp_path / 'out'}/: 2 new, 0 from before."]
    (line,) = done.stderr.splitlines()
    assert line.startswith("Sampling: 100% 4/4 [")
    assert "\r" not in done.stderr


def test_a_warning_of_an_unknown_key_is_printed(oldest, tmp_path):
    config = oldest / "scheduler" / "scheduler_config.json"
    before = config.read_text("utf-8")
    config.write_text(json.dumps({**json.loads(before), "beta_strat": 1}), "utf-8")
    done = run([*DDPM_HF, "sample", str(oldest), *SAMPLE, str(tmp_path / "out"), "--device", "cpu"])
    config.write_text(before, "utf-8")
    assert "beta_strat" in done.stderr


def test_tqdm_disable_is_respected(oldest, tmp_path, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    done = run([*DDPM_HF, "sample", str(oldest), *SAMPLE, str(tmp_path / "out"), "--device", "cpu"])
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_in_a_log_is_a_line_at_times(capsys, monkeypatch):
    assert list(progress.progress(range(10_000), desc="Quick", unit="step")) == list(range(10_000))
    assert capsys.readouterr().err.startswith("Quick: 100% 10000/10000 [")
    monkeypatch.setattr(progress, "LINES", {**progress.LINES, "mininterval": 0, "delay": 0})
    with progress.progress(desc="Slow", unit="image", total=3) as bar:
        for _ in range(3):
            bar.update()
        bar.set_postfix(loss="1.0", refresh=False)
        progress.write("a remark")
    printed = capsys.readouterr()
    assert printed.out == "a remark\n"
    assert [line.split("[")[0] for line in printed.err.splitlines()] == [
        "Slow: 0% 0/3 ", "Slow: 33% 1/3 ", "Slow: 67% 2/3 ", "Slow: 100% 3/3 ", "Slow: 100% 3/3 ",
    ]  # fmt: skip
    assert printed.err.splitlines()[-1].endswith("loss=1.0]")
    assert "\r" not in printed.err


def test_a_bar_that_is_removed_at_its_end_leaves_no_line(capsys):
    assert list(progress.progress(range(3), desc="Within", unit="step", leave=False)) == [0, 1, 2]
    assert list(progress.progress(range(3), desc="Hidden", unit="step", is_shown=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_in_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.progress(range(3), desc="Bar", unit="step")) == [0, 1, 2]
    assert "\rBar: 100%|" in capsys.readouterr().err
