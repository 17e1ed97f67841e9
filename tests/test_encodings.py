"""Output in encodings that lack letters of the paper, as on Windows, where a pipe is cp1252, and in the C locale."""

import os
import sys

import pytest

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from support.models import tiny_unet
from support.runs import TINY, run

PIPE = {"PYTHONIOENCODING": "cp1252"}
C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
ENCODINGS = pytest.mark.parametrize("encoding", [{**C_LOCALE, **PIPE}, C_LOCALE], ids=["cp1252", "ascii"])


def run_in(encoding, *arguments):
    """A command that must end well; returns its output."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))}
    done = run([sys.executable, "-m", *arguments], env={**plain, **encoding}, errors="replace")
    assert done.returncode == 0, done.stderr
    assert "codec" not in done.stderr
    return done.stdout


@ENCODINGS
def test_help_is_printed_in_any_encoding(encoding):
    commands = [
        "sample",
        "restore",
        "edit",
        "calibrate",
        "evaluate",
        "paper",
        "push",
        "convert",
        "export",
        "cache",
        "env",
    ]
    for command in ([], *([name] for name in commands)):
        assert "usage:" in run_in(encoding, "ddpm_hf", *command, "--help")
    for program in (["ddpm_hf", "train"], ["ddpm_hf.training"]):  # the second is what launchers start
        assert r"The \u03b2 schedule." in run_in(encoding, *program, "--help")


def test_the_plan_of_a_run_is_printed_in_any_encoding(tmp_path):
    folder = str(tmp_path / "фото-x̂")
    output = run_in(PIPE, "ddpm_hf", "train", *TINY, "--output_dir", folder, "--dry_run")
    assert r"\u0444\u043e\u0442\u043e-x\u0302" in output


@pytest.mark.filterwarnings("ignore:these betas never reach noise")
def test_calibrate_ends_in_any_encoding(tmp_path):
    DDPMPipelineCustom(tiny_unet(1), DDPMSchedulerCustom(20)).save_pretrained(tmp_path)
    options = ["--dataset", "digits", "--num_images", "16", "--device", "cpu"]
    assert r"x\u0302_0" in run_in(C_LOCALE, "ddpm_hf", "calibrate", str(tmp_path), *options)
