"""`ddpm-hf env`: what a bug report needs, and no secret."""

import re

import torch

from ddpm_hf.cli import main
from ddpm_hf.training.environment import describe_environment
from support.pretend_gpu import PretendGpu


def test_env_reports_versions_device_choices_and_disks(capsys):
    main(["env"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert f"torch {torch.__version__}" in lines["packages"]
    for name in ("device", "precision", "compiler", "FSDP", "variables"):
        assert lines[name]
    for name in ("models", "datasets", "here"):
        assert re.search(r"\d GB free$", lines[name])


def test_env_on_a_gpu_names_it_and_what_is_missing(monkeypatch):
    with PretendGpu(capability=(6, 1), memory=11 * 2**30):
        text = describe_environment()
    assert re.search(r"device +1 × pretended, 11 GiB, compute capability 6.1", text)
    assert re.search(r"precision +no with --mixed_precision auto, because this GPU lacks bfloat16", text)
    assert re.search(r"compiler +torch.compile needs a GPU of compute capability 7.0", text)


def test_env_shows_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    text = describe_environment()
    assert "secret" not in text
    assert re.search(r"Hub token +found", text)
