"""Models of the Hub: the real client, in a process of its own with a fresh cache, against a server on this machine."""

import os
import subprocess
import sys

import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from support.hub_server import serve_hub

SAMPLE = [sys.executable, "-c", "from ddpm_hf.cli import main; main()", "sample"]


@pytest.fixture
def hub(make_unet, tmp_path):
    """Runs a command with a Hub that has `someone/stock` and `someone/ours`."""
    DDPMPipeline(make_unet(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(
        tmp_path / "hub/someone/stock"
    )
    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "hub/someone/ours")
    with serve_hub(tmp_path / "hub") as server:
        env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        env.pop("HF_HUB_OFFLINE", None)
        yield lambda command: subprocess.run(
            command, env=env, capture_output=True, text=True, cwd=tmp_path, check=False
        )


@pytest.mark.slow
@pytest.mark.parametrize("model", ["someone/stock", "someone/ours"])
def test_sample_command_takes_models_of_the_hub(hub, model, tmp_path):
    done = hub([*SAMPLE, model, "--num_images", "2", "--num_inference_steps", "2", "--output_dir", "out"])
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"00000.png", "00001.png", "grid.png", "sampling.json"}


@pytest.mark.slow
def test_models_that_the_hub_does_not_have_are_named(hub, tmp_path):
    done = hub([*SAMPLE, "someone/else", "--output_dir", "out"])
    assert done.returncode == 1
    assert "error: there is no model 'someone/else'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_remote_code_comes_from_the_hub_and_needs_trust(hub):
    script = """
import sys
sys.modules["ddpm_hf"] = None  # not installed
from diffusers import DiffusionPipeline
print(type(DiffusionPipeline.from_pretrained("someone/ours")).__name__)
pipe = DiffusionPipeline.from_pretrained("someone/ours", custom_pipeline="someone/ours", trust_remote_code=True)
print(type(pipe).__name__, type(pipe.scheduler).__name__, pipe(num_inference_steps=2, output_type="np").images.shape)
try:
    DiffusionPipeline.from_pretrained("someone/ours", custom_pipeline="someone/ours")
except ValueError:
    print("refused")
"""
    done = hub([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [
        "DDPMPipeline",
        "DDPMPipelineCustom DDPMSchedulerCustom (1, 8, 8, 3)",
        "refused",
    ]
