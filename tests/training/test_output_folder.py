"""What a person has written into the output folder is there afterwards."""

import pytest

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.training.output_folder import RUN_FILES, prepare_output_dir
from support.runs import run, train_command

MY_WORDS = "\n## My words\n\nTrained on a rainy evening.\n"


@pytest.mark.slow
def test_my_words_in_a_card_survive_a_resumed_run(tmp_path):
    """Title, licence, and text that stands inside and outside of the sections that are ours."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_text("# Before the first run\n", "utf-8")  # a card of my own, from before
    done = run(train_command(folder, "--max_train_steps", "4"))
    assert done.returncode == 0, done.stderr
    assert "# Before the first run" in (folder / "README.md").read_text("utf-8")

    (folder / "README.md").unlink()
    done = run(train_command(folder, "--max_train_steps", "8", "--resume_from_checkpoint", "latest"))
    assert done.returncode == 0, done.stderr
    card = (folder / "README.md").read_text("utf-8")
    card = card.replace("# DDPM\n", "# Rainy digits\n").replace("---\n", "---\nlicense: cc-by-nc-4.0\n", 1) + MY_WORDS
    (folder / "README.md").write_text(card, "utf-8")
    done = run(train_command(folder, "--max_train_steps", "12", "--resume_from_checkpoint", "latest"))
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
    with pytest.raises(ValueError, match="README.md' is not text in UTF-8|is no text in UTF-8"):
        prepare_output_dir(tmp_path, TrainConfig(dataset_name="digits", output_dir=str(tmp_path)))
