"""Before a run: whatever can't work is found before anything is decoded or written."""

import json
import shutil
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.training.loop import train
from support.runs import TINY_UNET, train_here


def refused(tmp_path, *options):
    """The error of a run on a folder of images, which has not decoded or written anything."""
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for i in range(6):
        Image.effect_noise((16, 16), 60).save(images / f"{i}.png")
    config = parse_train_config(
        [
            f"--train_data_dir={images}", f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'out'}",
            "--channels=1", "--resolution=16", "--train_batch_size=2", *options,
        ],

    )  # fmt: skip
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller looks at it)
        train(config)
    assert not list(tmp_path.rglob("decoded_images"))
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_what_cannot_work_is_found_before_anything_is_decoded(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    unet = "--unet=" + json.dumps(TINY_UNET)
    assert "multiple of" in refused(tmp_path, unet, "--resolution=17")
    assert "only 6 images" in refused(tmp_path, unet, "--train_batch_size=7")
    assert "can't run" in refused(tmp_path, "--unet=" + json.dumps({**TINY_UNET, "layers_per_block": 0}))
    for wrong in ({"in_channels": 3}, {"out_channels": 7}):
        assert "1 channels" in refused(tmp_path, "--unet=" + json.dumps({**TINY_UNET, **wrong}))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "`mixed_precision` is 'fp16'" in refused(tmp_path, unet, "--mixed_precision=fp16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_deepspeed_is_refused_before_accelerate_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "DeepSpeed is not supported: use FSDP" in refused(tmp_path, "--unet=" + json.dumps(TINY_UNET))


def test_the_room_for_the_checkpoints_that_are_kept_is_checked_before_training(tmp_path, monkeypatch):
    options = ["--max_train_steps", "100", "--checkpointing_steps", "10", "--dry_run"]
    few, every = (train_here(tmp_path, *options, "--checkpoints_total_limit", limit) for limit in ("2", "0"))
    assert "Kept: the newest 2" in few.stdout
    assert "Kept: all" in every.stdout
    monkeypatch.setattr("ddpm_hf.storage.files.shutil.disk_usage", lambda path: SimpleNamespace(free=3 * 2**20))
    assert train_here(tmp_path, *options, "--checkpoints_total_limit", "2").returncode == 0
    refusal = train_here(tmp_path, *options, "--checkpoints_total_limit", "0").stderr
    assert "3.0 MiB free, but checkpoints (kept: all; see --checkpoints_total_limit) and the pipeline take" in refusal


def test_a_dry_run_reports_the_plan_and_trains_nothing(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    before = {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}
    options = ["--resume_from_checkpoint", "latest", "--dry_run"]
    done = train_here(output_dir, *options)
    assert done.returncode == 0, done.stderr
    assert "updates      12 of 8 images" in done.stdout
    assert "prediction_type: v_prediction" in done.stdout
    assert "validation   none (--eval_steps)" in done.stdout
    done = train_here(output_dir, *options, "--prediction_type", "sample")
    assert done.returncode == 1
    assert "is of another model" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}
