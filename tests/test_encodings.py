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
    for command in ([], ["train"], ["sample"], ["calibrate"], ["evaluate"], ["push"], ["convert"], ["env"]):
        assert "usage:" in run_in(encoding, "ddpm_hf", *command, "--help") or command == ["train"]
    assert r"The \u03b2 schedule." in run_in(encoding, "ddpm_hf", "train", "--help")


@pytest.mark.parametrize(
    ("encoding", "program", "folder", "printed"),
    [
        (PIPE, ("ddpm_hf", "train"), "фото-x̂", r"\u0444\u043e\u0442\u043e-x\u0302"),
        (C_LOCALE, ("ddpm_hf.training",), "run", r"images at 16\xd716"),  # which launchers start
    ],
)
def test_the_plan_of_a_run_is_printed_in_any_encoding(encoding, program, folder, printed, tmp_path):
    output = run_in(encoding, *program, *TINY, "--output_dir", str(tmp_path / folder), "--dry_run")
    assert printed in output
    assert "updates      12 of 8 images" in output


@pytest.mark.filterwarnings("ignore:these betas never reach noise")
@ENCODINGS
def test_calibrate_ends_in_any_encoding(encoding, tmp_path):
    DDPMPipelineCustom(tiny_unet(1), DDPMSchedulerCustom(20)).save_pretrained(tmp_path)
    options = ["--dataset", "digits", "--num_images", "16", "--device", "cpu"]
    assert r"x\u0302_0" in run_in(encoding, "ddpm_hf", "calibrate", str(tmp_path), *options)
