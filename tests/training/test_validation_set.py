"""Which images a run is measured on."""

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import StoredImages, load_images
from ddpm_hf.data.sources import open_source, open_stream
from ddpm_hf.training.loop import train
from ddpm_hf.training.validation_set import check_still_held_out, make_validation_set, open_eval_split


def config_of(**options):
    return TrainConfig(**{"dataset_name": "digits", "eval_steps": 10, "eval_images": 16, **options})


def numbered(count):
    """Images whose only pixel is their number."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return StoredImages(pixels, "numbers", torch.arange(count) % 10, [str(i) for i in range(10)])


def test_held_out_images_are_not_trained_on_and_all_others_are():
    config = config_of(seed=3)
    images, validation_set = make_validation_set(config, numbered(100), None)
    assert len(images) == 84
    epoch = torch.cat([b.pixels for b, _ in zip(images.batches(0, 4, 4, seed=0), range(21), strict=False)])
    assert sorted([*epoch.flatten().tolist(), *validation_set.pixels.flatten().tolist()]) == list(range(100))
    assert torch.equal(validation_set.labels, validation_set.pixels.flatten().long() % 10)
    assert not set(validation_set.seen.flatten().tolist()) & set(validation_set.pixels.flatten().tolist())
    assert torch.equal(make_validation_set(config, numbered(100), None)[1].pixels, validation_set.pixels)
    assert not torch.equal(make_validation_set(config_of(seed=4), numbered(100), None)[1].pixels, validation_set.pixels)
    batch, again = (next(images.batches(40, 8, 8, seed=1)) for _ in range(2))
    assert torch.equal(batch.labels, batch.pixels.flatten().long() % 10)
    assert torch.equal(batch.pixels, again.pixels)


@pytest.fixture
def dataset_with_a_test_split(tmp_path):
    """Gray images whose level encodes their class; the test split has fewer classes, numbered differently."""

    def split(names, count):
        levels = {"cat": 10, "dog": 100, "eel": 200}
        labels = [names[i % len(names)] for i in range(count)]
        images = [Image.new("L", (8, 8), levels[label]) for label in labels]
        return datasets.Dataset.from_dict({"image": images, "kind": labels}).cast_column("image", datasets.Image())

    parts = {"train": split(["cat", "dog", "eel"], 60), "test": split(["dog", "eel"], 20), "odd": split(["eel"], 20)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "pets"))
    return {
        "dataset_name": str(tmp_path / "pets"), "cache_dir": str(tmp_path / "cache"), "resolution": 8, "channels": 1,
        "eval_split": "test",
    }  # fmt: skip


def test_another_split_is_measured_on_by_the_names_of_its_labels(dataset_with_a_test_split):
    config = config_of(**dataset_with_a_test_split, label_column="kind")
    source = open_source(config)
    split = open_eval_split(config, source)
    everything = load_images(config, source, show_progress=False)
    images, validation_set = make_validation_set(config, everything, split)
    assert len(images) == 60
    assert len(validation_set.pixels) == 16
    expected = {100: 1, 200: 2}
    assert validation_set.labels.tolist() == [expected[int(level)] for level in validation_set.pixels[:, 0, 0, 0]]
    with pytest.raises(ValueError, match="`eval_images` is 21, but the split 'test' has 20 images: lower it"):
        open_eval_split(config_of(**dataset_with_a_test_split, eval_images=21), source)
    with pytest.raises(ValueError, match="`eval_split` is 'tset': "):
        open_eval_split(config_of(**{**dataset_with_a_test_split, "eval_split": "tset"}), source)
    swapped = open_source(config, "odd")
    with pytest.raises(ValueError, match="labels that the training set lacks: dog"):
        open_eval_split(config, swapped)


def test_a_stream_is_measured_on_another_split(dataset_with_a_test_split):
    options = {**dataset_with_a_test_split, "streaming": True, "max_train_steps": 9}
    config = config_of(**options)
    stream = open_stream(config)
    images, validation_set = make_validation_set(config, load_images(config, stream), open_eval_split(config, stream))
    assert not images.has_length
    assert validation_set.pixels.shape == validation_set.seen.shape == (16, 1, 8, 8)
    assert set(validation_set.pixels.unique().tolist()) == {100, 200}
    few = config_of(**options, eval_images=21)
    with pytest.raises(ValueError, match="the split 'test' has 20 images"):
        make_validation_set(few, images, open_eval_split(few, stream))
    with pytest.raises(ValueError, match="a stream can't set aside: name another split"):
        open_eval_split(config_of(**{**options, "eval_split": None}), stream)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval_images", "64"], "--eval_images without --eval_steps"),
        (["--load_best_model_at_end"], "--load_best_model_at_end without --eval_steps"),
        (["--eval_steps", "0"], "`eval_steps` is 0"),
        (["--eval_steps", "9", "--eval_images", "15"], "`eval_images` is 15, but must be at least 16"),
        (["--eval_steps", "9", "--eval_split", "test"], "digits has no splits"),
        (["--dataset_name=x/y", "--eval_steps=9", "--eval_split", "train[:9]"], "which is trained on"),
    ],
)
def test_inconsistent_options_are_refused(flags, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        parse_train_config(flags)


def test_too_many_held_out_images_are_refused_before_any_work(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="`eval_images` is 899, but there are only 1797 images.*at most half"):
        train(config_of(eval_images=899, output_dir=str(tmp_path / "out"), resolution=16, channels=1))
    assert not (tmp_path / "out").exists()


def test_images_that_were_trained_on_are_never_called_held_out():
    config = config_of(seed=1)
    check_still_held_out(config.public(), config_of(seed=1, eval_steps=7))
    check_still_held_out(config_of(seed=2).public(), TrainConfig(dataset_name="digits"))
    for before, reason in (
        (TrainConfig(dataset_name="digits"), "there was no --eval_steps"),
        (config_of(seed=2), "--seed was 2"),
        (config_of(seed=1, eval_images=32), "--eval_images was 32"),
    ):
        with pytest.raises(ValueError, match=f"can't be held out, and {reason} before"):
            check_still_held_out(before.public(), config)
