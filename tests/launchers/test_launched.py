"""Whole runs by Accelerate's launcher and the files in training/accelerate, on CPU processes that talk through gloo."""

import shutil

import pytest
import torch

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.storage.checkpoint import BEST, best_step, checkpoint_steps, load_checkpoint
from support.launching import (
    EVERYTHING,
    FSDP_ON_CPU,
    SMALL,
    TRAIN,
    accelerate_launch,
    node_env,
    start,
    start_ranks,
    start_two_nodes,
    succeed,
    wait_until,
)

pytestmark = pytest.mark.slow
RESUME = ["--resume_from_checkpoint", "latest"]


@pytest.fixture(scope="module")
def data(pictures):
    return ["--train_data_dir", str(pictures)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, data):
    """A finished run of two processes that fsdp.yaml describes."""
    folder = tmp_path_factory.mktemp("sharded")
    launcher = accelerate_launch("fsdp.yaml", "--num_processes", "2", "--main_process_port", "0")
    command = [*launcher, str(FSDP_ON_CPU), str(TRAIN), *EVERYTHING, *data, "--output_dir", str(folder / "run")]
    succeed([start(command, node_env(folder), folder / "log")])
    return folder / "run"


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory, data):
    """A finished run of two launchers, whose machines share the output folder and no cache."""
    folder = tmp_path_factory.mktemp("nodes")
    succeed(start_two_nodes(folder, *EVERYTHING, *data, output_dirs=[folder / "run"] * 2))
    return folder / "run"


def largest_difference(one, other, step):
    mine, theirs = (load_checkpoint(folder / f"checkpoint-{step}") for folder in (one, other))
    worst = 0.0
    for part in ("weights", "ema", "optimizer"):
        tensors, others = getattr(mine, part), getattr(theirs, part)
        assert tensors.keys() == others.keys()
        worst = max(worst, *(float((tensors[name] - others[name]).abs().max()) for name in tensors))
    return worst


def interrupted(run, output_dir, step):
    """A copy of a run as it was when it had written `checkpoint-<step>`."""
    shutil.copytree(run, output_dir)
    for later in checkpoint_steps(output_dir):
        if later > step:
            shutil.rmtree(output_dir / f"checkpoint-{later}")
    (output_dir / BEST).unlink()
    return ["--output_dir", str(output_dir)]


def test_sharded_weights_are_those_of_data_parallel_training(sharded, two_nodes):
    """With previews, validation, checkpoints, calibration and export between the updates."""
    for folder in (sharded, two_nodes):
        assert checkpoint_steps(folder) == [3, 6]
        for name in ("test_samples-1.png", "test_samples-4.png", "test_samples_raw-4.png"):
            assert (folder / "logs" / name).is_file()
        assert DDPMPipelineCustom.from_pretrained(folder).scheduler.config["_calibration"]
    initial = load_checkpoint(sharded / "checkpoint-3").weights["conv_in.weight"]
    assert (load_checkpoint(sharded / "checkpoint-6").weights["conv_in.weight"] - initial).abs().max() > 1e-3
    assert largest_difference(sharded, two_nodes, 6) < 1e-5


def test_a_sharded_run_resumes_exactly(sharded, tmp_path, data):
    output_dir = interrupted(sharded, tmp_path / "run", 3)
    succeed(start_ranks(tmp_path, *EVERYTHING, *data, *RESUME, *output_dir, config="fsdp.yaml"))
    assert largest_difference(sharded, tmp_path / "run", 6) == 0
    for name in ("logs/train.jsonl", "samples.png", "unet/diffusion_pytorch_model.safetensors"):
        assert (sharded / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_nodes_that_share_no_disk_resume_and_return_to_the_best_checkpoint(two_nodes, tmp_path, data):
    by_rank = interrupted(two_nodes, tmp_path / "run", 3), ["--output_dir", str(tmp_path / "elsewhere" / "run")]
    # By likelihood, so short a run exports its last weights: better ones of update 3 may be chance.
    options = [*EVERYTHING, *data, *RESUME, "--load_best_model_at_end", "--metric_for_best_model", "frechet"]
    succeed(start_ranks(tmp_path, *options, by_rank=by_rank))
    assert largest_difference(two_nodes, tmp_path / "run", 6) == 0
    assert not list((tmp_path / "elsewhere").rglob("*.safetensors"))
    best = load_checkpoint(tmp_path / "run" / f"checkpoint-{best_step(tmp_path / 'run')}").ema
    exported = DDPMPipelineCustom.from_pretrained(tmp_path / "run").unet.state_dict()
    assert all(torch.equal(best[name], exported[name]) for name in best)


def test_a_signal_to_one_launcher_ends_both_with_a_checkpoint_to_resume_from(tmp_path, data):
    options = [*SMALL, *data, "--save_images_steps", "10", "--checkpointing_steps", "1000", "--max_train_steps"]
    nodes = start_two_nodes(tmp_path, *options, "1000", output_dirs=[tmp_path / "run"] * 2)
    wait_until((tmp_path / "run" / "logs" / "test_samples-1.png").exists, nodes)
    nodes[1].process.terminate()
    statuses, outputs = zip(*(node.wait() for node in nodes), strict=True)
    assert all(statuses)
    step = max(checkpoint_steps(tmp_path / "run"))
    assert 0 < step < 1000
    assert f"Stopped after {step} updates. Resume with --resume_from_checkpoint latest." in outputs[0]
    output_dir = ["--output_dir", str(tmp_path / "run")]
    outputs = succeed(start_ranks(tmp_path, *options, str(step + 1), *RESUME, *output_dir))
    assert f"Done: {step + 1} updates" in outputs[0]


def test_when_a_node_dies_the_other_ends_and_names_the_last_checkpoint(tmp_path, data):
    options = [*SMALL, *data, "--max_train_steps", "1000", "--output_dir", str(tmp_path / "run")]
    ranks = start_ranks(tmp_path, *options, "--checkpointing_steps", "1", "--checkpoints_total_limit", "1000")
    wait_until(lambda: 2 in checkpoint_steps(tmp_path / "run"), ranks)
    ranks[1].process.kill()
    status, output = ranks[0].wait()
    assert status == 1
    last = tmp_path / "run" / f"checkpoint-{max(checkpoint_steps(tmp_path / 'run'))}"
    assert "error: another process of this run has ended, or can't be reached" in output
    assert f"its last checkpoint is {last}. Start it again with --resume_from_checkpoint latest." in output


@pytest.mark.parametrize("change", ["fewer", "other pixels"])
def test_nodes_that_see_different_data_are_told_before_training(change, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "theirs")
    if change == "fewer":
        (tmp_path / "theirs" / "40.png").unlink()
    else:
        (tmp_path / "theirs" / "40.png").rename(tmp_path / "theirs" / "00a.png")
    by_rank = [["--train_data_dir", str(folder)] for folder in (pictures, tmp_path / "theirs")]
    ends = [r.wait() for r in start_ranks(tmp_path, *SMALL, "--output_dir", str(tmp_path / "run"), by_rank=by_rank)]
    assert [status for status, _ in ends] == [1, 1]
    for _, output in ends:
        if change == "fewer":
            assert "differ in the number of images: 48 in rank 0 (" in output
            assert "; 47 in rank 1 (" in output
        else:
            assert "differ in the pixels of the first images: SHA-256 " in output
        assert "Give all machines the same files, in the same order." in output
        assert "Traceback" not in output
    assert not (tmp_path / "run" / "checkpoint-12").exists()


def test_processes_with_different_options_are_told_before_training(tmp_path, data):
    options = [*SMALL, *data, "--output_dir", str(tmp_path / "run")]
    ends = [r.wait() for r in start_ranks(tmp_path, *options, by_rank=([], ["--max_train_steps", "13"]))]
    assert [status for status, _ in ends] == [1, 1]
    assert "differ in `max_train_steps`: 12 in rank 0 (" in ends[0][1]
