"""Options: flags over files over defaults, and what bad ones get."""

import json

import pytest
import torch
from PIL import Image

from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.training.network import build_ema, build_unet
from ddpm_hf.training.plan import Plan
from support.runs import DIGITS, TINY_UNET, run, train_command


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("dataset_name: digits\nlearning_rate: 3e-3\ntrain_batch_size: 7\n")
    config = parse_train_config(["--config", str(file), "--train_batch_size", "9"])
    assert (config.learning_rate, config.train_batch_size, config.resolution) == (3e-3, 9, 64)


# The options of diffusers' train_unconditional.py (0.42) and their defaults; None where it has none.
STOCK_DEFAULTS = {
    "dataset_name": None, "dataset_config_name": None, "model_config_name_or_path": None, "train_data_dir": None,
    "output_dir": "ddpm-model-64", "overwrite_output_dir": False, "cache_dir": None, "resolution": 64,
    "center_crop": False, "random_flip": False, "train_batch_size": 16, "eval_batch_size": 16,
    "dataloader_num_workers": 0, "num_epochs": 100, "save_images_epochs": 10, "save_model_epochs": 10,
    "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "lr_scheduler": "cosine", "lr_warmup_steps": 500,
    "adam_beta1": 0.95, "adam_beta2": 0.999, "adam_weight_decay": 1e-6, "adam_epsilon": 1e-8, "use_ema": False,
    "ema_inv_gamma": 1.0, "ema_power": 0.75, "ema_max_decay": 0.9999, "push_to_hub": False, "hub_token": None,
    "hub_model_id": None, "hub_private_repo": False, "logging_dir": "logs", "local_rank": -1,
    "prediction_type": "epsilon", "ddpm_num_steps": 1000, "ddpm_num_inference_steps": 1000,
    "ddpm_beta_schedule": "linear", "checkpointing_steps": 500, "checkpoints_total_limit": None,
    "resume_from_checkpoint": None, "enable_xformers_memory_efficient_attention": False,
    "preserve_input_precision": False,
}  # fmt: skip


def test_every_option_of_the_stock_script_is_there_with_its_default():
    config = parse_train_config(["--train_data_dir", "pics"])
    given = {**STOCK_DEFAULTS, "train_data_dir": "pics"}
    assert {name: getattr(config, name) for name in given} == given
    for option in (["--logger", "tensorboard"], ["--mixed_precision", "bf16"], ["--mixed_precision=no"]):
        parse_train_config(["--train_data_dir", "pics", *option])
    assert parse_train_config(["--train_data_dir", "pics", "--prediction_type", "sample"]).weighting == "snr"
    assert config.weighting == "uniform"


def test_fewer_diffusion_steps_mean_fewer_sampling_steps():
    config = parse_train_config(["--train_data_dir", "pics", "--ddpm_num_steps", "500"])
    assert config.ddpm_num_inference_steps == 500


def test_help_groups_the_options_and_shows_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_train_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for group in ("data:", "network and process:", "loss:", "optimisation:", "output:", "the Hub:"):
        assert group in text
    assert "(default: 0.0001)" in text


def test_a_token_is_written_down_nowhere():
    config = parse_train_config(["--push_to_hub", "--hub_token", "hf_secret"])
    assert config.hub_token == "hf_secret"
    assert "hf_secret" not in repr(config) + str(config) + json.dumps(config.public())


PARAMETERS = {
    "digits": 686_769, "fashion_mnist": 2_734_945, "cifar10": 35_746_307, "cifar10_class_conditional": 35_751_939,
    "celebahq256": 113_673_219, "lsun256": 113_673_219, "butterflies64": 25_304_963,
    "colour64_t300": 25_304_963,
}  # fmt: skip


def test_every_preset_is_whole():
    files = {f.stem: f for f in DIGITS.parent.glob("*.yaml")}
    assert files.keys() == PARAMETERS.keys()
    for name, file in files.items():
        config = parse_train_config(["--config", str(file)])
        with torch.device("meta"):
            assert build_unet(config, 10 if config.label_column else None).num_parameters() == PARAMETERS[name]


def test_the_cifar_preset_is_that_of_appendix_b():
    config = parse_train_config(["--config", str(DIGITS.parent / "cifar10.yaml")])
    assert (config.learning_rate, config.lr_warmup_steps, config.train_batch_size) == (2e-4, 5000, 128)
    assert (config.max_train_steps, config.max_grad_norm, config.random_flip) == (800_000, 1, True)
    assert (config.unet["dropout"], config.ddpm_num_steps, config.ddpm_beta_schedule) == (0.1, 1000, "linear")
    ema = build_ema(config, torch.nn.Linear(1, 1))
    assert ema.get_decay(1) == 0  # the first update sets the average
    assert {ema.get_decay(step) for step in range(2, 100)} == {0.9999}
    rate = Plan(config, 50_000, 1).learning_rate
    assert (rate(0), rate(2500), rate(5000), rate(799_999)) == (0, 1e-4, 2e-4, 2e-4)


def test_no_source_means_the_digits_and_a_source_means_stock_defaults():
    assert parse_train_config(["--seed", "5"]).dataset_name == "digits"
    config = parse_train_config(["--train_data_dir", "pics"])
    assert (config.dataset_name, config.resolution, config.learning_rate) == (None, 64, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_batch_size", "0"], "train_batch_size.*0"),
        (["--ema_max_decay", "1.0"], "ema_max_decay.*1.0"),
        (["--ddpm_num_inference_steps", "2000"], "ddpm_num_inference_steps.*2000.*1000"),
        (["--dataset_name", "digits", "--train_data_dir", "x"], "both"),
        (["--unet", "{"], "unet.*JSON"),
        (["--channels", "5"], "channels.*5"),
        (["--channels", "1", "--image_mode", "RGB"], "channels.*1.*RGB.*3"),
        (["--image_mode", "CMYK"], "image_mode.*CMYK.*RGBA"),
        (["--streaming", "--train_data_dir", "x"], "max_train_steps"),
        (["--streaming"], "digits"),
        (["--cache_limit_gb", "-1"], "cache_limit_gb.*-1"),
        (["--dataloader_num_workers", "-1"], "dataloader_num_workers.*-1"),
        (["--shuffle_buffer_size", "0"], "shuffle_buffer_size.*0"),
        (["--learning_rate", "0"], "learning_rate.*0"),
        (["--learning_rate", "inf"], "learning_rate.*inf"),
        (["--ema_inv_gamma", "0"], "ema_inv_gamma.*0"),
        (["--logging_dir", "../x"], "logging_dir.*inside"),
        (["--logging_dir", "."], "logging_dir.*inside"),
        (["--output_dir", ""], "output_dir.*empty"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["--model_config_name_or_path", "x"], "both --unet"),
        (["--objective", "hybrid"], "hybrid.*fixed_small.*--variance_type learned_range"),
        (["--variance_type", "learned_range"], "learned_range.*--objective hybrid"),
        (["--objective", "vlb", "--snr_gamma", "5"], "vlb.*own weights"),
        (["--objective", "vlb", "--loss_weighting", "p2"], "vlb.*own weights"),
        (["--snr_gamma", "5", "--loss_weighting", "p2"], "snr_gamma.*5.*p2"),
        (["--report_to", "none", "tensorboard"], "none.*excludes other trackers"),
        (["--report_to", "aim"], "aim.*tensorboard"),
        (["--logger", "wandb", "--report_to", "tensorboard"], "logger.*wandb.*tensorboard"),
        (["--hub_model_id", "me/x"], "--hub_model_id without --push_to_hub"),
        (["--label_dropout", "1.5"], "label_dropout.*1.5"),
        (["--max_skipped_steps", "0"], "max_skipped_steps.*0"),
        (["--save_images_steps", "-1"], "save_images_steps.*-1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_train_config(options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("[1]", "option: value"),
        ("a: [", "not valid YAML"),
        ("dataset_name: digits\nresolution: [16]", "resolution.*of type int"),
        ("dataset_name: digits\nuse_ema: 3", "use_ema.*of type bool"),
        ("dataset_name: 7", "dataset_name.*of type str"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_train_config(["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("dataset_name: digits\nlr_scheduler: sine\n")
    with pytest.raises(ValueError, match="lr_scheduler.*'sine'.*'cosine'"):
        parse_train_config(["--config", str(tmp_path / "c.yaml")])


def test_damaged_images_are_named(tmp_path):
    for name in ("1.png", "test_2.png"):  # `datasets` would take the second one for a test set
        Image.effect_noise((32, 32), 50).save(tmp_path / name)
    config = TrainConfig(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), resolution=8)
    assert len(load_images(config, show_progress=False)) == 2
    (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes()[:400])
    with pytest.raises(ValueError, match=r"image \d .* can't be read"):
        load_images(config, show_progress=False)


def test_parquet_files_are_datasets(tmp_path):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {"picture": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)], "label": [0] * 3}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    config = TrainConfig(dataset_name=str(tmp_path / "t.parquet"), cache_dir=str(tmp_path / "cache"), resolution=8)
    assert load_images(config, show_progress=False).pixels[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_sources_that_hold_no_images_are_refused(tmp_path):
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, "no images")):
        config = TrainConfig(train_data_dir=str(path), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=message):
            load_images(config, show_progress=False)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"layer_per_block": 1}, "layer_per_block"),
        ({"num_class_embeds": 3}, "num_class_embeds"),
        ({"block_out_channels": 16}, "UNet2DModel can.t be built"),
    ],
)
def test_networks_that_can_not_be_built_are_refused(unet, message):
    with pytest.raises(ValueError, match=message):
        build_unet(TrainConfig(dataset_name="digits", resolution=16, unet={**TINY_UNET, **unet}))


def test_a_resolution_that_can_not_be_halved_is_refused():
    with pytest.raises(ValueError, match="resolution.*20.*multiple of 32"):
        build_unet(TrainConfig(dataset_name="digits", resolution=20))


def test_output_folders_that_can_not_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(train_command(tmp_path / "file" / "out"))
    assert done.returncode == 1
    assert "output_dir" in done.stderr
    assert "Traceback" not in done.stderr
