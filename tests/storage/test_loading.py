"""`load_pipeline`: what loads, and that bad models are named."""

import os
import shutil
import sys

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.sharing.card import CardFacts, write_card
from ddpm_hf.storage.loading import load_pipeline
from support.cards import card_of, code_blocks
from support.hub_server import serve_hub
from support.runs import run


@pytest.mark.parametrize("model", ["/nowhere/at/all", "nobody/nothing", "bad//name"])
def test_unknown_models_are_named(model, tmp_path):
    with pytest.raises(ValueError, match=f"no model '{model}'"):
        load_pipeline(model)
    with pytest.raises(ValueError, match="holds no model"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated weights", "missing weights", "no unet", "broken JSON", "no list", "key"])
def test_damaged_models_are_named(damage, make_unet, tmp_path):
    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "no unet":
        shutil.rmtree(tmp_path / "unet")
    elif damage == "broken JSON":
        (tmp_path / "unet" / "config.json").write_text("{")
    elif damage == "no list":
        (tmp_path / "model_index.json").write_text("[]")
    else:
        save_file({k: v for k, v in load_file(weights).items() if k != "conv_in.weight"}, weights)
    with pytest.raises(ValueError, match="is damaged"):
        load_pipeline(str(tmp_path))


def test_checkpoints_of_the_stock_script_load(make_unet, tmp_path):
    make_unet().save_pretrained(tmp_path / "checkpoint-500" / "unet_ema")
    with pytest.raises(ValueError, match="does not store its scheduler"):
        load_pipeline(str(tmp_path / "checkpoint-500"))
    DDPMScheduler(beta_schedule="sigmoid").save_pretrained(tmp_path / "scheduler")
    assert load_pipeline(str(tmp_path / "checkpoint-500")).scheduler.config.beta_schedule == "sigmoid"


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_models_of_the_hub_are_sampled_by_command_and_by_the_code_of_their_card(make_unet, tmp_path):
    """The real client, in a process of its own with an empty cache, against a server on this machine."""
    DDPMPipeline(make_unet(), DDPMScheduler(variance_type="fixed_large")).save_pretrained(tmp_path / "hub/me/stock")
    ours = tmp_path / "hub/me/ours"
    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom(num_train_timesteps=12)).save_pretrained(ours)
    write_card(ours, CardFacts(repo_id="me/ours"))
    card_code = "\n".join(code_blocks(card_of(ours)))
    script = f"""
from diffusers import DiffusionPipeline
from ddpm_hf.cli import main
for model in ("me/stock", "me/ours"):
    main(["sample", model, "--num_images", "2", "--num_inference_steps", "2", "--output_dir", "out/" + model])
try:
    DiffusionPipeline.from_pretrained("me/ours", custom_pipeline="me/ours")
except ValueError:
    print("refused without trust_remote_code")
{card_code}
print([image.size for image in images])
main(["sample", "me/none", "--output_dir", "out/none"])
"""
    with serve_hub(tmp_path / "hub") as server:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = run([sys.executable, "-c", script], env=env, cwd=tmp_path)
    for model in ("me/stock", "me/ours"):
        names = {p.name for p in (tmp_path / "out" / model).iterdir()}
        assert names >= {"00000.png", "00001.png", "grid.png", "sampling.json"}, done.stderr
    assert "refused without trust_remote_code" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith(str([(8, 8)] * 4)), done.stderr
    assert done.returncode == 1
    assert "error: there is no model 'me/none'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/none").exists()
