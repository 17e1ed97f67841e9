"""What fits the memory of a GPU, and what happens where something does not."""

import pytest
import torch

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.commands.calibrate import calibrate
from ddpm_hf.commands.evaluate import evaluate
from ddpm_hf.commands.sample import sample
from ddpm_hf.config.commands import CalibrateConfig, EvaluateConfig, SampleConfig
from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import read_progress
from ddpm_hf.training.network import build_unet
from support.devices import assert_equal, train
from support.models import tiny_unet
from support.pretend_gpu import PretendGpu
from support.runs import TINY_OPTIONS

MANY = 1 << 30  # bytes


def gradients(**options):
    torch.manual_seed(0)
    unet = build_unet(TrainConfig(**{**TINY_OPTIONS, **options})).train()
    torch.manual_seed(1)
    unet(torch.randn(4, 1, 16, 16), torch.arange(4)).sample.square().mean().backward()
    return [p.grad for p in unet.parameters()]


def test_gradient_checkpointing_gives_the_same_gradients_dropout_included():
    for stored, computed_again in zip(gradients(), gradients(gradient_checkpointing=True), strict=True):
        assert torch.equal(stored, computed_again)


def peak(tmp_path, **options):
    with PretendGpu(memory=MANY) as gpu:
        train(tmp_path / str(options), max_train_steps=1, **options)
    return gpu.peak


def test_gradient_checkpointing_and_smaller_batches_take_less_memory(tmp_path):
    whole = peak(tmp_path, train_batch_size=32)
    assert peak(tmp_path, train_batch_size=32, gradient_checkpointing=True) < 0.8 * whole
    assert peak(tmp_path, train_batch_size=8) < 0.8 * whole


@pytest.fixture
def memory_for_eight(tmp_path):
    return int(1.1 * peak(tmp_path, train_batch_size=8))


def test_auto_finds_the_most_that_fits_and_keeps_the_images_per_update(tmp_path, memory_for_eight):
    options = {"train_batch_size": "auto", "global_batch_size": 64}
    with PretendGpu(memory=memory_for_eight):
        train(tmp_path / "run", max_train_steps=2, **options)
    progress = read_progress(tmp_path / "run" / "checkpoint-2")
    found = progress["config"]["train_batch_size"]
    assert found in (2, 4, 8)
    assert found * progress["config"]["gradient_accumulation_steps"] == 64
    assert progress["images_seen"] == 128


def test_a_resumed_run_keeps_what_was_found_and_goes_on_bit_for_bit(tmp_path, memory_for_eight):
    options = {"train_batch_size": "auto", "global_batch_size": 16}
    with PretendGpu(memory=memory_for_eight):
        whole = train(tmp_path / "whole", max_train_steps=4, checkpointing_steps=2, **options)
    with PretendGpu(memory=MANY):  # where all sixteen would fit
        options["resume_from_checkpoint"] = str(tmp_path / "whole" / "checkpoint-2")
        resumed = train(tmp_path / "resumed", max_train_steps=4, **options)
    assert_equal(whole, resumed)


def test_where_all_images_of_an_update_fit_there_is_no_accumulation(tmp_path):
    with PretendGpu(memory=MANY):
        train(tmp_path, max_train_steps=1, train_batch_size="auto")
    config = read_progress(tmp_path / "checkpoint-1")["config"]
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (128, 1)


def test_a_batch_that_does_not_fit_says_what_to_lower(tmp_path, memory_for_eight):
    message = r"CUDA out of memory.*`train_batch_size` is 64: add --gradient_checkpointing, or lower it"
    with PretendGpu(memory=memory_for_eight), pytest.raises(MemoryError, match=message):
        train(tmp_path, train_batch_size=64)


def test_a_network_that_does_not_fit_at_all_says_so(tmp_path):
    with PretendGpu(memory=100_000), pytest.raises(ValueError, match="not even one image at a time fits"):
        train(tmp_path, train_batch_size="auto")


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (sample, SampleConfig(num_images=64, batch_size=64, fast=False)),
        (evaluate, EvaluateConfig(dataset_name="digits", metrics="bpd", num_likelihood_images=64, batch_size=64)),
        (calibrate, CalibrateConfig(dataset_name="digits", num_images=64, batch_size=64)),
    ],
)
def test_a_command_that_does_not_fit_says_what_to_lower(command, options, tmp_path):
    scheduler = DDPMSchedulerCustom(10, beta_schedule="squaredcos_cap_v2")
    DDPMPipelineCustom(tiny_unet(channels=1), scheduler).save_pretrained(tmp_path / "model")
    options.output_dir = str(tmp_path / "made")
    message = "CUDA out of memory.* `batch_size` is 64: pass a smaller --batch_size"
    with PretendGpu(memory=200_000), pytest.raises(MemoryError, match=message):
        command(str(tmp_path / "model"), options)


# --- the global batch, on any device ---------------------------------------------------------------------------------


def test_the_global_batch_sets_the_accumulation(tmp_path):
    train(tmp_path, max_train_steps=1, train_batch_size=4, global_batch_size=12)
    assert read_progress(tmp_path / "checkpoint-1")["config"]["gradient_accumulation_steps"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": "auto"}, "`train_batch_size` is 'auto', which is measured on a GPU; this is a CPU"),
        (
            {"global_batch_size": 10},
            "`global_batch_size` is 10, but 1 × `train_batch_size` 4 does not divide it: pass",
        ),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 4}, "is 4, but `global_batch_size` 8 takes 2: leave"),
    ],
    ids=str,
)
def test_global_batches_that_can_not_be_made_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)


@pytest.mark.parametrize("value", ["0", "some", None, 2.5, True])
def test_other_batch_sizes_are_refused(value):
    with pytest.raises(ValueError, match="but must be an integer of at least 1, or 'auto'"):
        TrainConfig(**{**TINY_OPTIONS, "train_batch_size": value})


def test_the_batch_size_is_a_number_or_auto_on_the_command_line_and_in_a_file(tmp_path):
    assert parse_train_config(["--train_batch_size", "8"]).train_batch_size == 8
    assert parse_train_config(["--train_batch_size", "auto"]).train_batch_size == "auto"
    file = tmp_path / "options.yaml"
    file.write_text("dataset_name: digits\ntrain_batch_size: auto\n")
    assert parse_train_config(["--config", str(file)]).train_batch_size == "auto"
