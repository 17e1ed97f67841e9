"""Validation during training: what is measured is what it is called, on images that are not trained on."""

import json
import signal

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import avg_pool2d

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import StoredImages, load_images
from ddpm_hf.data.pixels import to_uint8
from ddpm_hf.data.sources import open_source, open_stream
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.distributed import Agreement
from ddpm_hf.evaluation.likelihood import bits_per_dim
from ddpm_hf.evaluation.metrics.distances import frechet_distance, moments
from ddpm_hf.evaluation.metrics.patch_features import PatchFeatures
from ddpm_hf.storage.checkpoint import best_step, checkpoint_steps
from ddpm_hf.training.interruption import Interrupted
from ddpm_hf.training.log import TrainingLog
from ddpm_hf.training.loop import train
from ddpm_hf.training.network import build_ema, build_unet
from ddpm_hf.training.plan import EVAL_CALLS, EVAL_SAMPLING_STEPS, Plan
from ddpm_hf.training.state import Run
from ddpm_hf.training.validation import Validation
from ddpm_hf.training.validation_set import check_still_held_out, make_validation_set, open_eval_split
from support.runs import TINY_OPTIONS


def config_of(**options):
    return TrainConfig(**{"dataset_name": "digits", "eval_steps": 10, "eval_images": 16, **options})


# --- which images ----------------------------------------------------------------------------------------------------


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
    """Gray images whose level tells their class; the test split has fewer classes, which count otherwise there."""

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
def test_options_that_make_no_sense_are_refused(flags, message):
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


# --- the features ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    images = load_images(TrainConfig(dataset_name="digits", resolution=16, channels=1, label_column="label"))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    return images.pixels[order], images.labels[order]


def test_the_distance_tells_what_a_bad_model_does_from_what_a_good_one_does(digits):
    pixels, labels = digits
    validation_set, real, others = pixels[:256], pixels[256:512], pixels[512:]
    features = PatchFeatures(validation_set)
    reference = moments(features(validation_set))

    def distance(images):
        return frechet_distance(moments(features(images)), reference)

    def noisy(scale):
        noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
        return (real + scale * noise).round().clamp(0, 255).to(torch.uint8)

    floor = max(distance(images) for images in (real, *others.split(256)[:4]))
    by_noise = [distance(noisy(scale)) for scale in (8, 16, 32, 64)]
    assert [distance(real), *by_noise] == sorted([distance(real), *by_noise])
    assert by_noise[1] > 2 * floor
    halves = torch.cat([real[:, :, :8], real.roll(1, 0)[:, :, 8:]], dim=2)
    blurred = avg_pool2d(real.float(), 3, 1, 1).round().to(torch.uint8)
    few_classes = others[labels[512:] < 5][:256]
    one_image = real[:1].expand(256, -1, -1, -1)
    for worse in (halves, blurred, few_classes, real.flip(3), one_image):
        assert distance(worse) > 2 * floor


def test_features_are_a_function_of_the_images_in_every_size_and_mode():
    for shape in ((4, 1, 8, 8), (16, 3, 40, 40), (20, 2, 16, 16)):
        images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        one, two = PatchFeatures(images), PatchFeatures(images)
        assert torch.equal(one(images), two(images))
        assert one(images).shape == (shape[0], max(1, shape[0] // 4))
        torch.testing.assert_close(one(images[:3]), one(images)[:3], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="number of images"):
        PatchFeatures(images[:1])


# --- what is measured ------------------------------------------------------------------------------------------------


def a_run(tmp_path, classes=None):
    config = TrainConfig(
        **{**TINY_OPTIONS, "output_dir": str(tmp_path), "max_train_steps": 1, "eval_steps": 1, "eval_images": 16}
    )
    unet = build_unet(config, classes)
    accelerator = Accelerator(cpu=True)
    plan, ema = Plan(config, 1781, 1), build_ema(config, unet)
    log = TrainingLog(accelerator, config, 1)
    log.begin(0, [])
    return Run(config, plan, DDPMSchedulerCustom(), accelerator, Agreement(1), unet, None, ema), log


@pytest.mark.parametrize("classes", [None, 10])
def test_what_is_logged_is_measured_on_the_exported_weights(classes, tmp_path):
    """The average differs from the raw weights here; what was measured is measured again by hand."""
    run, log = a_run(tmp_path, classes)
    for shadow in run.ema.shadow_params:
        shadow.mul_(0.5)
    images = load_images(TrainConfig(**TINY_OPTIONS, label_column="label" if classes else None))
    _, validation_set = make_validation_set(run.config, images, None)
    raw = [p.clone() for p in run.unet.parameters()]
    checks = []
    run.step = 1
    validation = Validation(run, log, validation_set)
    assert validation.measure(lambda: checks.append(1))
    assert len(checks) == EVAL_CALLS + EVAL_SAMPLING_STEPS  # one batch
    assert all(torch.equal(a, b) for a, b in zip(raw, run.unet.parameters(), strict=True))
    assert validation.measure(lambda: checks.append(1))  # known already
    assert len(checks) == EVAL_CALLS + EVAL_SAMPLING_STEPS
    (entry,) = log.validations()
    assert entry == json.loads((tmp_path / "logs" / "train.jsonl").read_text())

    run.ema.copy_to(run.unet.parameters())
    pipe = DDPMPipelineCustom(run.unet.eval(), DDPMSchedulerCustom())
    pipe.set_progress_bar_config(disable=True)
    bits = bits_per_dim(pipe, validation_set.pixels, calls_per_image=EVAL_CALLS, class_labels=validation_set.labels)
    assert entry["eval_bits_per_dim"] == bits.total
    assert entry["eval_bits_per_dim_se"] == bits.standard_error
    samples = pipe(
        16, [torch.Generator().manual_seed(i) for i in range(16)], EVAL_SAMPLING_STEPS, "latent", timesteps="linspace",
        eta=0.0, solver_order=2, class_labels=validation_set.labels,
    ).images  # fmt: skip
    features = PatchFeatures(validation_set.pixels)
    of_samples, of_seen, of_real = (
        moments(features(x)) for x in (to_uint8(samples), validation_set.seen, validation_set.pixels)
    )
    assert entry["eval_frechet"] == frechet_distance(of_samples, of_real)
    assert entry["eval_frechet_of_training_images"] == frechet_distance(of_seen, of_real)


def test_a_signal_ends_a_validation_which_leaves_no_trace(tmp_path):
    run, log = a_run(tmp_path)
    _, validation_set = make_validation_set(run.config, load_images(TrainConfig(**TINY_OPTIONS)), None)
    before = [p.clone() for p in run.unet.parameters()]
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == EVAL_CALLS + 3:  # among the samples
            raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        Validation(run, log, validation_set).measure(interrupt)
    assert log.validations() == []
    assert all(torch.equal(a, b) for a, b in zip(before, run.unet.parameters(), strict=True))
    assert run.unet.training
    Validation(run, log, validation_set).measure(lambda: None)
    Validation(run, other := TrainingLog(run.accelerator, run.config, 1), validation_set).measure(lambda: None)
    assert log.validations() == other.validations() != []


def test_the_best_is_the_smallest_finite_value_whose_checkpoint_is_there(tmp_path):
    run, log = a_run(tmp_path)
    _, validation_set = make_validation_set(run.config, load_images(TrainConfig(**TINY_OPTIONS)), None)
    validation = Validation(run, log, validation_set)
    for step, bits, frechet in ((2, 1.0, 9.0), (4, 3.0, 1.0), (6, 2.0, 3.0), (8, float("nan"), float("nan"))):
        values = {"eval_bits_per_dim": bits, "eval_bits_per_dim_se": 0.1, "eval_frechet": frechet}
        log.write_validation(step, {**values, "eval_frechet_of_training_images": 0.5})
    for step in (4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    run.step = 8
    validation.record_best()
    assert best_step(tmp_path) == 6
    run.config.metric_for_best_model = "frechet"
    validation.record_best()
    record = json.loads((tmp_path / "best_checkpoint.json").read_text())
    assert (record["checkpoint"], record["metric_for_best_model"]) == ("checkpoint-4", "frechet")
    assert min(Image.open(tmp_path / "validation.png").size) > 300


# --- runs ------------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_outlives_the_limit_and_is_exported_if_asked_for(tmp_path, capsys):
    """A learning rate that ruins the network: the first checkpoint is the best."""
    AcceleratorState._reset_state(reset_partial_state=True)
    options = {**TINY_OPTIONS, "lr_scheduler": "constant", "learning_rate": 0.3, "checkpoints_total_limit": 1}
    options |= {"max_train_steps": 9, "checkpointing_steps": 2, "ema_max_decay": 0.1}
    options |= {"eval_steps": 3, "eval_images": 16, "load_best_model_at_end": True, "save_images_steps": 0}
    train(TrainConfig(**options, output_dir=str(tmp_path)))
    assert best_step(tmp_path) == 3
    assert checkpoint_steps(tmp_path) == [3, 9]
    weights = "unet/diffusion_pytorch_model.safetensors"
    exported, best, last = (load_file(tmp_path / place / weights) for place in (".", "checkpoint-3", "checkpoint-9"))
    assert all(torch.equal(weight, best[name]) for name, weight in exported.items())
    assert any(not torch.equal(weight, last[name]) for name, weight in exported.items())
    assert f"best      {tmp_path}/checkpoint-3 by bits_per_dim: " in capsys.readouterr().out
    log = [json.loads(line) for line in (tmp_path / "logs" / "train.jsonl").read_text().splitlines()]
    assert [e["step"] for e in log if "eval_frechet" in e] == [3, 6, 9]
