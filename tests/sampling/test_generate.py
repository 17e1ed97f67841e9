"""`load_pipeline` and `ddpm-hf sample`: what loads, and what bad input gets."""

import shutil

import pytest
from safetensors.torch import load_file

from ddpm_hf import DDPMPipelineCustom


@pytest.mark.parametrize("model", ["/nowhere/at/all", "nobody/nothing", "bad//name"])
def test_unknown_models_are_named(model, tmp_path):
    from ddpm_hf.storage.loading import load_pipeline

    with pytest.raises(ValueError, match=f"no model '{model}'"):
        load_pipeline(model)
    with pytest.raises(ValueError, match="holds no model"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated weights", "missing weights", "no unet", "broken JSON", "no list", "key"])
def test_damaged_models_are_named(damage, make_unet, tmp_path):
    from safetensors.torch import save_file

    from ddpm_hf import DDPMSchedulerCustom
    from ddpm_hf.storage.loading import load_pipeline

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_inference_steps", "2000"], "num_inference_steps.*2000"),
        (["--device", "abacus"], "device.*abacus"),
        (["--eta", "2"], "eta.*2"),
        (["--seed", str(2**64)], "seed.*2\\^63"),
        (["--class_label", "1"], "unconditional"),
        (["--revision", "v1"], "revision.*folder"),
    ],
)
def test_bad_sample_options_end_in_one_line_and_write_nothing(options, message, make_unet, tmp_path):
    from ddpm_hf import DDPMSchedulerCustom
    from ddpm_hf.cli import main

    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["sample", str(tmp_path / "model"), "--output_dir", str(out), *options])
    assert not out.exists() or not any(out.iterdir())


def test_images_of_a_longer_run_are_not_mixed_in(make_unet, tmp_path):
    from ddpm_hf import DDPMSchedulerCustom
    from ddpm_hf.cli import main

    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out")]
    main([*command, "--num_images", "3"])
    main([*command, "--num_images", "3"])  # the same again is fine
    with pytest.raises(SystemExit, match=r"holds 1 images of a longer run \(number 2 "):
        main([*command, "--num_images", "2"])


def test_checkpoints_of_the_stock_script_load(make_unet, tmp_path):
    from diffusers import DDPMScheduler

    from ddpm_hf.storage.loading import load_pipeline

    make_unet().save_pretrained(tmp_path / "checkpoint-500" / "unet_ema")
    with pytest.raises(ValueError, match="does not store its scheduler"):
        load_pipeline(str(tmp_path / "checkpoint-500"))
    DDPMScheduler(beta_schedule="sigmoid").save_pretrained(tmp_path / "scheduler")
    assert load_pipeline(str(tmp_path / "checkpoint-500")).scheduler.config.beta_schedule == "sigmoid"
