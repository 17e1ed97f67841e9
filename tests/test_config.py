"""Options: flags over files over defaults, and what bad ones get."""

import pytest
from PIL import Image
from runs import DIGITS, TINY_UNET, run, train_command

from ddpm_hf.config import TrainConfig, parse_train_config
from ddpm_hf.data import load_images
from ddpm_hf.training import (
    build_unet,
)


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("dataset_name: digits\nlearning_rate: 3e-3\ntrain_batch_size: 7\n")
    config = parse_train_config(["--config", str(file), "--train_batch_size", "9"], DIGITS)
    assert (config.learning_rate, config.train_batch_size, config.resolution) == (3e-3, 9, 64)


def test_no_source_means_the_digits_and_a_source_means_stock_defaults():
    assert parse_train_config(["--seed", "5"], DIGITS).dataset_name == "digits"
    config = parse_train_config(["--train_data_dir", "pics"], DIGITS)
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
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_train_config(options, DIGITS)


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
        parse_train_config(["--config", str(tmp_path / "c.yaml")], DIGITS)
    (tmp_path / "c.yaml").write_text("dataset_name: digits\nlr_scheduler: sine\n")
    with pytest.raises(ValueError, match="lr_scheduler.*'sine'.*'cosine'"):
        parse_train_config(["--config", str(tmp_path / "c.yaml")], DIGITS)


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
        ({"block_out_channels": 16}, "no UNet2DModel"),
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
