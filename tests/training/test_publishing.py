"""A training run that shares its model: real runs against a Hub on this machine that breaks."""

import re
import sys

import pytest

from support.hub_server import TOKEN, environment, serve_hub
from support.runs import run, train_command

PUSH = ["--push_to_hub", "--hub_model_id", "me/digits", "--save_images_steps", "0"]


@pytest.fixture
def hub():
    with serve_hub() as server:
        server.add_token(TOKEN, "me")
        server.add_token("hf_read", "me", role="read")
        yield server


@pytest.mark.slow
def test_a_run_pushes_checkpoints_and_its_result_and_keeps_the_token_secret(hub, tmp_path):
    """While the Hub stumbles: one commit is refused for a moment, the answer to another is lost."""
    hub.fail("POST .*/commit/", 503)
    hub.fail("POST .*/commit/", "lose")
    output_dir = tmp_path / "run"
    done = run(train_command(output_dir, *PUSH), env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"Pushed to {hub.url}/me/digits" in done.stdout
    files = hub.repos["me/digits"].files()
    assert (
        files["unet/diffusion_pytorch_model.safetensors"]
        == (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert {"README.md", "samples.png", "loss.png", "pipeline.py"} <= files.keys()
    assert not any("real" in name for name in files)  # training images stay here
    assert not any("training_state" in name or "logs" in name or "checkpoint" in name for name in files)
    card = files["README.md"].decode()
    assert "| Optimizer updates | 12 |" in card
    assert "| Images seen | 96 |" in card
    assert str(tmp_path) not in card
    titles = hub.repos["me/digits"].titles.values()
    assert any(title.startswith("Upload DDPM, checkpoint-") for title in titles)
    written = [p for p in output_dir.rglob("*") if p.is_file()] + [tmp_path / "stdout"]
    (tmp_path / "stdout").write_text(done.stdout + done.stderr)
    assert not any(TOKEN.encode() in p.read_bytes() for p in written)
    assert not any(TOKEN in str(body) for body in hub.received)


@pytest.mark.slow
def test_a_token_that_may_not_write_is_found_before_training(hub, tmp_path):
    done = run(train_command(tmp_path / "run", *PUSH), env=environment(hub, tmp_path, "hf_read"))
    assert done.returncode == 1
    assert "the token of 'me' is read-only: create one with the role `write`" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    assert not hub.repos


@pytest.mark.slow
def test_a_hub_that_fails_at_the_end_costs_only_one_command(hub, tmp_path):
    hub.add_repo("me/digits")
    hub.fail("POST .*/commit/", 403, times=100)
    done = run(train_command(tmp_path / "run", *PUSH), env=environment(hub, tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model_index.json").is_file()
    assert re.search(rf"Push it with:\s+ddpm-hf push {tmp_path}/run me/digits", done.stdout)
    hub.faults.clear()
    command = [sys.executable, "-c", "from ddpm_hf.cli import main; main()", "push", str(tmp_path / "run"), "me/digits"]
    pushed = run(command, env=environment(hub, tmp_path))
    assert pushed.returncode == 0, pushed.stderr
    assert "unet/diffusion_pytorch_model.safetensors" in hub.repos["me/digits"].files()
