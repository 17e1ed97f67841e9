"""What a command prints beside its result: progress, and nothing that helps nobody."""

import json
import os
import signal
import sys

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from ddpm_hf import progress
from ddpm_hf.cli import _again
from ddpm_hf.console import one_line_errors
from support.models import tiny_unet
from support.runs import run, start, wait_for

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


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_sampling_prints_its_result_and_a_line_of_progress(oldest, tmp_path, dtype):
    done = run([*DDPM_HF, "sample", str(oldest), *SAMPLE, str(tmp_path / "out"), "--dtype", dtype, "--device", "cpu"])
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"Images in {tmp_path / 'out'}/: 2 new, 0 from before."]
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
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)  # which commands that ran in this process have set
    assert list(progress.progress(range(10_000), desc="Quick", unit="step")) == list(range(10_000))
    assert capsys.readouterr().err.startswith("Quick: 100% 10000/10000 [")
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
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


@pytest.mark.parametrize(("columns", "shown"), [(100, b"\rBar: 100%|"), (0, b"\nBar: 100% 3/3 ")])
def test_a_terminal_without_a_size_shows_lines(columns, shown, monkeypatch):
    """As a container's, or one that `script` makes without a terminal of its own."""
    openpty = pytest.importorskip("pty").openpty
    termios = pytest.importorskip("termios")
    reader, terminal = openpty()
    termios.tcsetwinsize(terminal, (30, columns))
    with os.fdopen(terminal, "w") as stderr, os.fdopen(reader, "rb", 0) as received:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("TQDM_MININTERVAL", "0")
        assert list(progress.progress(range(3), desc="Bar", unit="step", file=stderr)) == [0, 1, 2]
        stderr.flush()
        assert shown in received.read(100_000)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "status"),
    [("ddpm_hf.cli", -signal.SIGINT), ("torch", 130), ("diffusers", 130)],
)
def test_ctrl_c_during_imports_prints_no_traceback(module, status, tmp_path):
    """Sent by the import itself, in a process that was told to sample."""
    script = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from ddpm_hf.__main__ import main\n"
        "main()\n"
    )
    done = run([sys.executable, "-c", script, "sample", "model", "--output_dir", str(tmp_path / "out")])
    assert done.returncode == status
    if status > 0:
        assert done.stderr.splitlines()[-2:] == [
            "Interrupted by Ctrl-C. What was saved before is unharmed. Run it again with:",
            f"  ddpm-hf sample model --output_dir {tmp_path / 'out'}",
        ]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sigterm_during_a_calibration_ends_with_a_word_and_the_command(tmp_path):
    DDPMPipeline(tiny_unet(channels=1), DDPMScheduler(1000)).save_pretrained(tmp_path / "model")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json")}
    command = ["calibrate", str(tmp_path / "model"), "--dataset", "digits", "--num_images", "64"]
    process = start([*DDPM_HF, *command], env={**os.environ, "TQDM_MININTERVAL": "0"})
    wait_for(process, b"Calibrating")
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Interrupted by SIGTERM. What was saved" in output
    assert f"Run it again with:\n  ddpm-hf {' '.join(command)}\n" in output
    assert "Traceback" not in output
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json")} == before


def test_the_command_to_run_again_holds_no_token():
    for token in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]):
        again = _again(["push", "my model", *token, "me/model"])
        assert again == "Run it again with:\n  ddpm-hf push 'my model' me/model"


def test_signals_are_handled_as_before_when_a_command_has_ended():
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    with one_line_errors(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before
