"""The plan of a run, as a function of images, speeds and a time. Nothing is measured here."""

import io
import math
import re
from dataclasses import replace
from datetime import datetime

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from ddpm_hf.config.options import duration
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.sources import Source, open_source, open_stream
from ddpm_hf.recipe import rules
from ddpm_hf.recipe.images import Look, look_at
from ddpm_hf.recipe.machine import Machine
from ddpm_hf.recipe.plan import Trial, make_plan, rounded
from ddpm_hf.training.network import build_unet
from ddpm_hf.training.setup import use_cores

PHOTOS = Look("photos", 5000, 250, 200, "RGB", 0.49, 0.0, (), (), 512, 1e-3)
END = datetime(2030, 1, 2, 3, 4, 5)
START = 12.0  # seconds of a time that are over when the plan is made


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1d12h", 129600), ("1.5h", 5400), ("+1h", 3600), ("1h30m", 5400)]
)
def test_durations(text, seconds):
    assert duration(text, "time_budget") == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 m", "-1h", "1h+", "0s", "1y", "++1h", "h1"])
def test_what_is_no_duration_is_refused_by_name(text):
    with pytest.raises(ValueError, match=r"`time_budget` is .*30m, 8h"):
        duration(text, "time_budget")
    with pytest.raises(ValueError, match="time_budget"):
        TrainConfig(dataset_name="digits", time_budget=text)


def test_two_ends_of_a_run_are_refused():
    with pytest.raises(ValueError, match="max_train_steps.*5.*time_budget.*leave one"):
        TrainConfig(dataset_name="digits", time_budget="1h", max_train_steps=5)


def plan(given=None, look=PHOTOS, seconds=3600.0, speed=1e9, memory=math.inf, power=1.0):
    """On a machine of `speed` operations per second, which holds updates of at most `memory` images.

    The time per image goes with a power of the operations, and is as usual for those of the smallest network at 32×32.
    """
    sizes = {}

    def weigh(options, resolution):
        width, layers = options["unet"]["block_out_channels"][0], options["unet"]["layers_per_block"]
        parameters = 2700 * width**2 * layers
        sizes[resolution, width] = parameters
        return parameters, 180.0 * width**2 * layers * resolution**2

    def measure(options, is_last):
        if is_last:
            return None
        parameters, operations = weigh(options, options["resolution"])
        batch = options["train_batch_size"]
        if batch > memory:
            return None
        images = batch * options.get("gradient_accumulation_steps", 1)
        smallest = 180.0 * 8**2 * 32**2
        per_image = 3 * smallest * (operations / smallest) ** power / speed
        return Trial(options, parameters, operations, images * per_image, 1 / per_image)

    budget = f"{round(seconds + START)}s" if given is None else "1h"
    return make_plan(
        {"dataset_name": "x", "time_budget": budget, **(given or {})}, look, seconds, END, 1, "cpu", weigh, measure
    )


def test_more_time_never_makes_a_network_or_a_resolution_smaller_and_each_sees_the_images_that_it_wants():
    plans = [plan(seconds=60 * 4.0**n, speed=1e10) for n in range(9)]
    resolutions = [p.options["resolution"] for p in plans]
    assert resolutions == sorted(resolutions)
    assert resolutions[0] < resolutions[-1]
    for p in plans[1:]:
        seen = p.updates * p.options["train_batch_size"] * p.options.get("gradient_accumulation_steps", 1)
        assert seen >= 0.95 * rules.images_wanted(p.trial.parameters, p.options["resolution"])
    sizes = [p.trial.parameters for p in plans if p.options["resolution"] == resolutions[-1]]
    assert sizes == sorted(sizes)


def test_short_runs_have_small_updates_only_where_they_keep_the_device_busy():
    assert [rules.batch_size(20_000, None, r, "cpu") for r in (16, 32, 128)] == [32, 8, 8]
    assert rules.batch_size(20_000, None, 32, "cuda") == 32
    assert rules.batch_size(6e6, None, 32, "cpu") == rules.batch_size(6e6, None, 32, "cuda") == 128
    assert rules.batch_size(20_000, 10, 16, "cpu") <= 5


@pytest.mark.parametrize(
    ("given", "weighting"),
    [
        ({"prediction_type": "epsilon"}, "uniform"),
        ({"snr_gamma": 3.0}, "min_snr"),
        ({"loss_weighting": "snr"}, "snr"),
        ({"resolution": 16}, "uniform"),
        ({"resolution": 32}, "min_snr_v"),
    ],
)
def test_the_loss_that_is_given_is_kept_and_the_others_are_planned(given, weighting):
    assert TrainConfig(**plan({"resolution": 32, **given}).options).weighting == weighting


def test_a_network_that_is_faster_than_its_operations_say_is_found():
    """A machine whose time per image is not proportional to the operations, as with small networks."""
    usual, wasteful = (plan({"resolution": 32}, seconds=600.0, speed=4e9, power=power).trial for power in (1.0, 0.5))
    assert wasteful.parameters > usual.parameters
    assert wasteful.images_per_second * 540 >= rules.images_wanted(wasteful.parameters, 32)


def test_photographs_are_learned_by_larger_networks_in_the_same_time_than_digits():
    # What was measured: in 600 s of a core at 32×32, and in 40 s at 16×16
    assert rules.images_wanted(687_347, 32) < rules.images_wanted(1_541_547, 32) <= 24_000
    assert rules.images_wanted(687_347, 16) == pytest.approx(12_000, rel=0.01)
    assert rules.images_wanted(1_541_547, 16) > 50_000


def test_every_option_that_is_given_is_kept_and_the_rest_fits_it():
    given = {
        "resolution": 32, "train_batch_size": 10, "learning_rate": 5e-4, "prediction_type": "epsilon",
        "random_flip": False, "use_ema": False, "channels": 1,
    }  # fmt: skip
    options = plan(given).options
    assert {name: options[name] for name in given} == given
    TrainConfig(**options)
    assert "image_mode" not in options


@pytest.mark.parametrize("resolution", [8, 16, 20, 24, 28, 30, 32, 36, 48, 50, 64, 96, 100, 160, 192, 224, 512])
def test_a_resolution_that_can_be_halved_has_networks_that_run_and_end_in_a_few_pixels(resolution):
    with torch.device("meta"):
        for unet in rules.networks(resolution)[:2]:
            config = TrainConfig(dataset_name="x", resolution=resolution, image_mode="L", unet=unet)
            assert resolution >> (len(build_unet(config).config.block_out_channels) - 1) <= 32


@pytest.mark.parametrize("resolution", [7, 27, 63, 150, 225, 250])
def test_one_that_cannot_is_refused_with_its_neighbours_that_can(resolution):
    with pytest.raises(ValueError, match=f"`resolution` is {resolution}.*--resolution") as error:
        plan({"resolution": resolution})
    for near in re.findall(r"\d+", str(error.value).partition("--resolution")[2]):
        assert rules.networks(int(near))
        assert abs(int(near) - resolution) < 32


def test_a_batch_that_does_not_fit_is_accumulated():
    big, small = plan(speed=1e12), plan(speed=1e12, memory=8)
    assert big.options["train_batch_size"] > 8 >= small.options["train_batch_size"]
    accumulated = small.options["train_batch_size"] * small.options["gradient_accumulation_steps"]
    assert accumulated == big.options["train_batch_size"]
    with pytest.raises(ValueError, match=r"memory.*--resolution"):
        plan(memory=0)


def test_a_time_that_is_too_short_says_what_it_would_take():
    with pytest.raises(ValueError, match=r"12 s are over before.*One update.*Pass --time_budget") as error:
        plan(seconds=30.0, speed=1e6)
    plan(seconds=_needed(error) - START, speed=1e6)


@pytest.mark.parametrize("start", [0.0, START, 100.0])
def test_what_it_would_take_is_more_than_what_was_too_short_by_the_start_that_was_measured(start):
    given = {"time_budget": f"{start + 2:g}s"}
    with pytest.raises(ValueError, match=f"but {start:.0f} s are over") as error:
        plan(given, seconds=2.0)
    assert _needed(error) >= start + 15
    plan(given, seconds=_needed(error) - start, speed=1e10)


def _needed(error):
    return duration(re.search(r"--time_budget (\w+)", str(error.value))[1], "time_budget")


def test_durations_are_rounded_up():
    assert [rounded(s) for s in (7, 119, 121, 7201)] == ["10s", "120s", "3m", "3h"]


def test_the_plan_says_what_why_and_until_when():
    text = "\n".join(plan().lines)
    for phrase in (
        "photos in 3612s, until January 02, 03:04:05",
        "5,000, color, 250 pixels",
        "mirrored at random",
        "images/s",
        "expect",
    ):
        assert phrase in text
    few = "\n".join(plan(look=Look("few", 60, 20, 20, "L", math.nan, 0.3, (), (), 60, 1e-3)).lines)
    assert "Only 60 images" in few
    assert "30% of the images have near-duplicates" in few
    assert "nothing: too few images" in few


def test_a_small_set_is_measured_often_ends_when_it_gains_no_more_and_exports_the_best():
    small, large, hurried = (
        plan(look=replace(PHOTOS, count=count), speed=speed, seconds=seconds)
        for count, speed, seconds in ((2000, 1e10, 3600), (50_000, 1e10, 3600), (2000, 1e9, 120))
    )
    assert TrainConfig(**small.options).early_stopping_patience == 3
    assert small.options["load_best_model_at_end"]
    assert small.options["eval_steps"] == small.updates // 8
    assert "training ends when they gain no more" in "\n".join(small.lines)
    assert TrainConfig(**large.options).early_stopping_patience is None
    assert not large.options["load_best_model_at_end"]
    assert TrainConfig(**hurried.options).early_stopping_patience is None  # validations would cost too much


# --- looking at images ----------------------------------------------------------------------------------------------


def source(pictures):
    return Source("pictures", None, len(pictures), lambda indices: [pictures[i] for i in indices])


def look(pictures):
    return look_at(source(pictures), TrainConfig(dataset_name="x"))


def blobs(n, mode="RGB", size=(40, 30)):
    """Smooth random pictures, in which nothing says left or right."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 5, 5, len(mode)), np.uint8)
    return [Image.fromarray(p[..., 0] if mode == "L" else p).resize(size, Image.Resampling.BICUBIC) for p in pixels]


def text(n):
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(n):
        picture = Image.new("L", (24, 24))
        x, y = rng.integers(2, 9, 2)
        ImageDraw.Draw(picture).text((x, y), "RBKEFGPS"[i % 8], fill=255, font_size=14)
        pictures.append(picture)
    return pictures


def test_digits_and_letters_are_never_mirrored_and_what_has_no_direction_is():
    assert not rules.flips(look_at(open_source(TrainConfig(dataset_name="digits")), TrainConfig(dataset_name="x")))
    assert not rules.flips(look(text(400)))
    assert rules.flips(look(blobs(400)))
    assert not rules.flips(look(blobs(40)))  # too few to see


def test_what_a_look_finds():
    seen = look(blobs(100))
    assert (seen.count, seen.side, seen.smallest, seen.mode, seen.near_duplicates) == (100, 30, 30, "RGB", 0.0)
    assert look([p.convert("RGB") for p in blobs(70, "L")]).mode == "L"  # color files of gray pictures
    transparent = blobs(70)
    transparent[3].putalpha(100)
    assert look(transparent).mode == "RGBA"
    repeated = look([*blobs(100), *(p.resize((80, 60)) for p in blobs(50))])
    assert repeated.near_duplicates == pytest.approx(100 / 150)
    assert seen.transparent == 0
    assert look(transparent).transparent == pytest.approx(1 / 70)
    assert "1% of the images have transparent parts" in "\n".join(rules.warnings(look(transparent), 32))
    assert "All images" in "\n".join(rules.warnings(look(blobs(1) * 70), 32))
    assert not seen.are_equal
    broken = io.BytesIO(b"no image").getvalue()
    rows = [{"bytes": broken, "path": "broken.png"}, *blobs(70)]
    assert [bad.path for bad in look(rows).unreadable] == ["broken.png"]
    assert "broken.png" in "\n".join(rules.warnings(look(rows), 32))
    with pytest.raises(ValueError, match=r"broken\.png.*can't be read"):
        look(rows[:1])


def test_classes_of_a_data_set_are_no_sub_folders(tmp_path):
    """Images in a file may have paths, too, of which a reader of the plan knows nothing."""
    rows = {"image": [], "kind": [i % 2 for i in range(80)]}
    for i, picture in enumerate(blobs(80)):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        rows["image"].append({"bytes": stream.getvalue(), "path": f"{'ab'[i % 2]}/{i}.png"})
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    file = str(tmp_path / "pets.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    config = TrainConfig(dataset_name=file, cache_dir=str(tmp_path / "cache"))
    for opened in (open_source(config), open_stream(replace(config, streaming=True, max_train_steps=1))):
        text = "\n".join(rules.warnings(look_at(opened, config), 32))
        assert "2 classes (cat, dog) are not told apart: --label_column kind trains" in text
        assert "sub-folders" not in text


def test_a_look_at_large_images_ends_in_time():
    seen = look_at(source(blobs(100)), TrainConfig(dataset_name="x"), seconds=0.0)
    assert seen.looked_at < 100
    assert (seen.count, seen.side, seen.mode) == (100, 30, "RGB")


@pytest.mark.parametrize(("seconds", "expected"), [({2: 1.0, 1: 0.3}, 1), ({2: 0.6, 1: 1.0}, None)])
def test_a_plan_trains_with_one_thread_where_other_programs_slow_down_more(seconds, expected, monkeypatch):
    """With the measurements of a busy machine and of a quiet one."""
    threads = torch.get_num_threads()
    machine = Machine()
    monkeypatch.setattr(machine, "update_seconds", lambda *_: seconds[torch.get_num_threads()])
    try:
        torch.set_num_threads(2)
        measured = machine.best_threads(TrainConfig(dataset_name="x"), None, 1.0)
        assert measured == (min(seconds.values()), expected)
        assert machine.best_threads(TrainConfig(dataset_name="x", cpu_threads=2), None, 1.0) == (seconds[2], 2)
        use_cores(machine.state, expected)
        assert torch.get_num_threads() == (expected or 2)
    finally:
        torch.set_num_threads(threads)
