"""The output folder: other people's files and other runs stay, and `latest` is always of this run."""

import shutil
from dataclasses import replace

import pytest
import torch

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import checkpoint_steps, latest_checkpoint, load_checkpoint
from ddpm_hf.training.output_folder import RUN_FILES, clear_output_dir, prepare_output_dir
from support.runs import train_here

MY_WORDS = "\n## My words\n\nTrained on a rainy evening.\n"


@pytest.mark.slow
def test_my_words_in_a_card_survive_a_resumed_run(tmp_path):
    """Title, licence, and text that stands inside and outside of the sections that are ours."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("# Before the first run\n", "utf-8")  # a card of my own, from before
    done = train_here(folder, "--max_train_steps", "4")
    assert done.returncode == 0, done.stderr
    assert "# Before the first run" in (folder / "README.md").read_text("utf-8")

    (folder / "README.md").unlink()
    done = train_here(folder, "--max_train_steps", "8", "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    card = (folder / "README.md").read_text("utf-8")
    card = card.replace("# DDPM\n", "# Rainy digits\n").replace("---\n", "---\nlicense: cc-by-nc-4.0\n", 1) + MY_WORDS
    (folder / "README.md").write_text(card, "utf-8")
    done = train_here(folder, "--max_train_steps", "12", "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    after = (folder / "README.md").read_text("utf-8")
    for words in (
        "# Rainy digits",
        "license: cc-by-nc-4.0",
        "Trained on a rainy evening.",
        "| Optimizer updates | 12 |",
    ):
        assert words in after


@pytest.mark.parametrize("name", ["pipeline.py", "loss.png", "samples.png", "metrics.json"])
@pytest.mark.parametrize("resume", [None, "latest"])
def test_files_of_mine_are_not_overwritten(tmp_path, name, resume):
    assert name in RUN_FILES
    (tmp_path / name).write_text("mine")
    config = TrainConfig(dataset_name="digits", output_dir=str(tmp_path), resume_from_checkpoint=resume)
    with pytest.raises(ValueError, match=rf"{name}: move them away, choose another --output_dir, or pass --overwrite"):
        prepare_output_dir(tmp_path, config)
    assert (tmp_path / name).read_text() == "mine"


def test_a_card_that_can_not_be_merged_is_found_before_training(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="README.md' is not UTF-8 text"):
        prepare_output_dir(tmp_path, TrainConfig(dataset_name="digits", output_dir=str(tmp_path)))


def test_a_run_is_not_overwritten_without_the_flag(finished_run):
    output_dir, _ = finished_run
    before = {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}
    done = train_here(output_dir)
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert "--resume_from_checkpoint latest" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_a_checkpoint_is_not_resumed_in_the_folder_of_another_run(finished_run, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(finished_run[0], theirs)
    before = {p: p.stat().st_mtime_ns for p in theirs.rglob("*") if p.is_file()}
    checkpoint = str(finished_run[0] / "checkpoint-8")
    done = train_here(theirs, "--resume_from_checkpoint", checkpoint)
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in theirs.rglob("*") if p.is_file()}
    done = train_here(tmp_path / "new", "--resume_from_checkpoint", checkpoint)  # a fork into a new folder
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(tmp_path / "new") == [8, 12]  # so that `latest` is never a new beginning there
    ours, reference = (load_checkpoint(f / "checkpoint-12") for f in (tmp_path / "new", finished_run[0]))
    for name, weight in reference.weights.items():  # by another number of threads, perhaps
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-3, atol=1e-5)


def test_output_folders_with_a_file_in_the_way_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet").write_text("a file")
    config = TrainConfig(dataset_name="digits", output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="unet' is not a folder"):
        prepare_output_dir(tmp_path / "out", config)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link' is not a folder"):
        prepare_output_dir(tmp_path / "link", config)


def test_clearing_removes_what_a_run_leaves_and_nothing_else(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    (output_dir / "notes.txt").write_text("mine")
    config = TrainConfig(dataset_name="digits", output_dir=str(output_dir))
    files = sorted(output_dir.rglob("*"))
    clear_output_dir(config, 0)
    assert files == sorted(output_dir.rglob("*"))
    clear_output_dir(replace(config, overwrite_output_dir=True), 0)
    left = sorted(p.relative_to(output_dir).as_posix() for p in output_dir.rglob("*") if p.is_file())
    assert left == [".lock", "README.md", "logs/config.json", "notes.txt"]  # a card may hold a person's words


def test_damaged_checkpoints_are_skipped_and_named(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-12" / "training_state" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    folder, skipped = latest_checkpoint(tmp_path / "run")
    assert folder is not None
    assert folder.name == "checkpoint-8"
    assert "weights.safetensors differs from its hash" in skipped[0]
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_checkpoint(tmp_path / "run" / "checkpoint-12")
    (tmp_path / "run" / "checkpoint-8" / "unet" / "config.json").unlink()
    assert latest_checkpoint(tmp_path / "run")[0] is None


@pytest.mark.parametrize(
    "name",
    ["samples.png", "Samples.PNG", "unet/logs", "checkpoint-8", "metrics.json", "README.md", "x.partial", ".lock"],
)
def test_logs_have_no_folder_that_the_run_writes_something_else_to(name, tmp_path):
    config = TrainConfig(dataset_name="digits", resolution=16, output_dir=str(tmp_path), logging_dir=name)
    with pytest.raises(ValueError, match=f"`logging_dir` is '{name}', but the run writes something else of this name"):
        prepare_output_dir(tmp_path, config)
    prepare_output_dir(tmp_path, replace(config, logging_dir="logs/samples.png"))
