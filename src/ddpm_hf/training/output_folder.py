"""The output folder of a training run: whether it may be used, how it is cleared, how a pipeline gets into it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from ..config.training import TrainConfig
from ..diffusion.ddpm_repository import CODE_FILES, EVALUATION_FILES
from ..diffusion.pipeline import DDPMPipelineCustom
from ..sharing.card import read_card
from ..sharing.card_merge import parse_card
from ..storage.checkpoint import BEST, check_intact, checkpoint_steps, latest_checkpoint, remove_checkpoint
from ..storage.files import check_writable, full_disk_explained, write_text_atomically
from ..storage.weights import size_of

# What a run leaves in its folder beside checkpoints: with them, all that --overwrite_output_dir may remove.
PICTURES = ("samples.png", "real.png", "samples_and_real.png", "loss.png", "validation.png")
REPORT = "report.html"
RECIPE = "recipe.yaml"
TROUBLES, PLAN, BITS = "trouble.jsonl", "plan.json", "held_out_bits.json"  # in the folder of the logs
RUN_FILES = ("model_index.json", *CODE_FILES, *PICTURES, *EVALUATION_FILES, BEST, REPORT, RECIPE)
RUN_FOLDERS = ("unet", "scheduler")
OF_ONE_COMMAND = ("resume_from_checkpoint", "overwrite_output_dir", "dry_run", "local_rank")  # not of the run
LOG_FILES = ("train.jsonl", TROUBLES, PLAN, BITS, "tracker_run", "skipped_images.json")


def prepare_output_dir(output_dir: Path, config: TrainConfig) -> tuple[Path | None, list[str]]:
    """Check, before any work, that the run can write to its folder.

    Returns:
        The checkpoint to resume from, if any, and why newer ones were skipped.

    Raises:
        ValueError: for a folder that can't be written or holds another run, and for a checkpoint that does not exist.
    """
    check_writable(output_dir)
    _check_logging_dir(config)
    for folder in [output_dir, output_dir / config.logging_dir, *(output_dir / name for name in RUN_FOLDERS)]:
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is not a folder, but the run needs one of this name: move it away.")
    resume = config.resume_from_checkpoint
    if resume is None:
        _refuse_other_run(output_dir, config)
        return None, []
    if resume != "latest":
        checkpoint = Path(resume)
        if not checkpoint.is_dir() and len(checkpoint.parts) == 1:  # a bare name
            checkpoint = output_dir / checkpoint
        check_intact(checkpoint)
        if checkpoint.resolve().parent != output_dir.resolve():
            _refuse_other_run(output_dir, config)
        return checkpoint, []
    latest, skipped = latest_checkpoint(output_dir)
    if latest is None and (skipped or (output_dir / "model_index.json").exists()):
        raise ValueError(
            f"`resume_from_checkpoint` is 'latest', but {str(output_dir)!r} has no intact checkpoint. "
            + " ".join(skipped)
        )
    if latest is None:
        _refuse_foreign_files(output_dir, config)
    return latest, skipped


def _check_logging_dir(config: TrainConfig) -> None:
    """Raise a ValueError where the folder of the logs has the name of something else that a run writes."""
    first = Path(config.logging_dir).parts[0].casefold()  # on some disks, samples.PNG is samples.png
    reserved = (*RUN_FILES, *RUN_FOLDERS, "README.md", ".lock")
    if first in {name.casefold() for name in reserved} or re.fullmatch(r"checkpoint-.*|.*\.partial", first):
        raise ValueError(
            f"`logging_dir` is {config.logging_dir!r}, but the run writes something else of this name: choose another "
            "one, such as logs."
        )


def _refuse_other_run(output_dir: Path, config: TrainConfig) -> None:
    traces = (output_dir / "model_index.json", output_dir / config.logging_dir / "train.jsonl")
    if not config.overwrite_output_dir and (checkpoint_steps(output_dir) or any(t.exists() for t in traces)):
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds another run: resume it with --resume_from_checkpoint latest, "
            "replace it with --overwrite_output_dir, or choose another --output_dir."
        )
    _refuse_foreign_files(output_dir, config)


def _refuse_foreign_files(output_dir: Path, config: TrainConfig) -> None:
    """A first run overwrites nothing that somebody else has put there. A card of theirs is merged, if it can be."""
    card = read_card(output_dir)
    if card is not None:
        parse_card(card).is_edited()
    if config.overwrite_output_dir:
        return
    is_run = (output_dir / config.logging_dir / "train.jsonl").is_file()  # that ended before its first checkpoint
    foreign = [name for name in RUN_FILES if (output_dir / name).exists() and not (is_run and name == REPORT)]
    if foreign:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} has files that no run has written but this one would overwrite, "
            f"{', '.join(foreign)}: move them away, choose another --output_dir, or pass --overwrite_output_dir."
        )


def clear_output_dir(config: TrainConfig, start: int, log: Callable[[str], object] = print) -> None:
    """Make way for a run that begins at update `start`.

    From 0 on, what an earlier run has left is removed with `overwrite_output_dir`, and nothing without. Otherwise
    checkpoints beyond `start`, which are damaged or newer than the one resumed from, are renamed to
    `checkpoint-<step>.abandoned`, so that `latest` is always of this run.
    """
    output_dir = Path(config.output_dir)
    if start:
        for step in [s for s in checkpoint_steps(output_dir) if s > start]:
            aside = output_dir / f"checkpoint-{step}.abandoned"
            shutil.rmtree(aside, ignore_errors=True)
            (output_dir / f"checkpoint-{step}").rename(aside)
            log(f"Set aside: {aside}, damaged or newer than the checkpoint you resumed from. Safe to delete.")
    elif config.overwrite_output_dir:
        for step in checkpoint_steps(output_dir):
            remove_checkpoint(output_dir / f"checkpoint-{step}")
        logs = output_dir / config.logging_dir
        mine = [output_dir / name for name in RUN_FILES] + [logs / name for name in LOG_FILES]
        for file in [*mine, *logs.glob("test_samples*.png")]:
            file.unlink(missing_ok=True)
        for name in RUN_FOLDERS:
            shutil.rmtree(output_dir / name, ignore_errors=True)


def write_recipe(config: TrainConfig, outcome: str = "") -> None:
    """Write the options of a run with a time budget as YAML, from which `--config` repeats it.

    Args:
        outcome: what a person should know of the run, in a line.
    """
    options = {k: v for k, v in config.public().items() if k not in OF_ONE_COMMAND}
    head = "# ddpm-hf train --config recipe.yaml --output_dir NEW repeats this run" + (
        f"\n# {outcome}" if outcome else ""
    )
    text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    write_text_atomically(Path(config.output_dir) / RECIPE, f"{head}\n{text}")


def replace_pipeline(pipeline: DDPMPipelineCustom, output_dir: Path) -> None:
    """Write a pipeline into the output folder, each file atomically.

    Raises:
        OSError: where it can't be written.
    """
    partial = output_dir / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    with full_disk_explained(output_dir, size_of(pipeline.unet.parameters())):
        try:
            if (output_dir / "README.md").is_file():  # the card keeps what a person has edited in it
                shutil.copyfile(output_dir / "README.md", partial / "README.md")
            pipeline.save_pretrained(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    for file in [p for p in partial.rglob("*") if p.is_file()]:
        place = output_dir / file.relative_to(partial)
        place.parent.mkdir(exist_ok=True)
        file.replace(place)
    shutil.rmtree(partial)
