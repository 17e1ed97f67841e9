"""Training checkpoints, written atomically; the old one is deleted only afterwards.

A checkpoint is a folder `checkpoint-<step>` that is also a pipeline (of the EMA weights, if the run keeps an EMA), so
that whatever loads a model loads a checkpoint. Beside the pipeline it holds `training_state/` and a manifest of hashes.
Weights are stored unsharded, however the processes had sharded them, and nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..diffusion.pipeline import DDPMPipelineCustom
from .files import full_disk_explained, read_json, sync
from .weights import size_of

MANIFEST = "manifest.json"
STATE = "training_state"
MAX_COUNT, MAX_SECONDS = 2**53, 1e11  # of what a run may count
AVERAGES = "averages.safetensors"
BEST = "best_checkpoint.json"
FULL_DISK_REMEDY = "Earlier checkpoints are kept: free some space, then resume with --resume_from_checkpoint latest."
PIPELINE_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@dataclass
class TrainingState:
    """The complete state of a run."""

    progress: dict[str, Any]  # counts and options, as JSON
    weights: dict[str, Tensor]  # those that the optimizer updates
    optimizer: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None  # only when read: they are written as the pipeline's weights
    averages: dict[str, Tensor] = field(default_factory=dict)  # `<width>/<weight>` of those that are not exported

    @property
    def step(self) -> int:
        """Updates done."""
        return self.progress["step"]


def checkpoint_steps(output_dir: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending."""
    if not output_dir.is_dir():
        return []
    matches = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in output_dir.iterdir() if p.is_dir())
    return sorted(int(m[1]) for m in matches if m)


def best_step(output_dir: Path) -> int | None:
    """The step of the checkpoint that validation has recorded as the best, if any."""
    try:
        return int(read_json(output_dir / BEST)["step"])
    except (FileNotFoundError, ValueError, TypeError, KeyError, OverflowError):
        return None


def save_checkpoint(output_dir: Path, pipeline: DDPMPipelineCustom, state: TrainingState, total_limit: int = 0) -> Path:
    """Write `checkpoint-<step>`, then delete the oldest ones beyond `total_limit` (0: none), except the best one.

    Everything is written into a temporary folder, hashed, flushed to the disk and renamed, and a checkpoint is renamed
    before it is deleted: a folder of that name is always complete.

    Raises:
        OSError: if it can't be written, for example on a full disk. Earlier checkpoints are kept.
    """
    final = output_dir / f"checkpoint-{state.step}"
    tensors = [*pipeline.unet.parameters(), *state.weights.values(), *state.optimizer.values()]
    tensors += state.averages.values()
    with full_disk_explained(final, size_of(tensors), FULL_DISK_REMEDY):
        try:
            return _save_checkpoint(output_dir, pipeline, state, total_limit)
        except BaseException:
            _remove(final.with_name(f"{final.name}.partial"))
            raise


def _save_checkpoint(output_dir: Path, pipeline: DDPMPipelineCustom, state: TrainingState, total_limit: int) -> Path:
    final = output_dir / f"checkpoint-{state.step}"
    partial = output_dir / f"{final.name}.partial"
    for leftover in output_dir.glob("checkpoint-*.partial"):
        _remove(leftover)
    pipeline.save_pretrained(partial)
    folder = partial / STATE
    folder.mkdir()
    save_file(_contiguous(state.weights), folder / "weights.safetensors")
    save_file(_contiguous(state.optimizer), folder / "optimizer.safetensors")
    if state.averages:
        save_file(_contiguous(state.averages), folder / AVERAGES)
    (folder / "progress.json").write_text(json.dumps(state.progress, indent=2), "utf-8")

    files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != "README.md")  # which users may edit
    manifest = {p.relative_to(partial).as_posix(): _sha256(p) for p in files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), "utf-8")
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if final.exists():
        remove_checkpoint(final)
    partial.rename(final)
    sync(output_dir)

    if total_limit:
        best = best_step(output_dir)
        for step in [s for s in checkpoint_steps(output_dir) if s <= state.step][:-total_limit]:
            if step != best:
                remove_checkpoint(output_dir / f"checkpoint-{step}")
    return final


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, renamed first, so that an interruption leaves nothing that looks like a checkpoint.

    What can't be deleted stays as `*.partial` until the next checkpoint is written.
    """
    _remove(folder.rename(folder.with_name(f"{folder.name}.old.partial")))


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def read_progress(folder: Path) -> dict[str, Any]:
    """The counts and options of an intact checkpoint.

    Raises:
        ValueError: for a file that no run has written.
    """
    file = folder / STATE / "progress.json"
    try:
        progress = read_json(file)
    except OSError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for name, is_sound in SOUND_PROGRESS.items():
        if name == "clock" and isinstance(progress, dict) and name not in progress:
            continue  # of a run without a time budget
        if not isinstance(progress, dict) or name not in progress or not is_sound(progress[name]):
            found = repr(progress.get(name))[:80] if isinstance(progress, dict) else "no mapping"
            raise ValueError(f"{str(file)!r} is damaged: its `{name}` ({found}) is not what a run writes.")
    return progress


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_COUNT


def _is_list_of(is_sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_sound, value))


def _is_config(value: object) -> bool:
    batch = ("train_batch_size", "gradient_accumulation_steps")
    return isinstance(value, dict) and all(_is_count(value.get(name), 1) for name in batch)


def _is_clock(value: object) -> bool:
    names = ("budget", "elapsed", "fraction", "first_update")
    sound = isinstance(value, dict) and all(_is_number(value.get(n)) and 0 <= value[n] < MAX_SECONDS for n in names)
    return sound and value["fraction"] <= 1  # type: ignore[index]


# What `read_progress` takes for the work of a run.
SOUND_PROGRESS: dict[str, Callable[[Any], bool]] = {
    "step": _is_count,
    "images_seen": _is_count,
    "seconds": lambda value: _is_number(value) and 0 <= value < MAX_SECONDS,
    "max_steps": _is_count,
    "num_images": lambda value: value is None or _is_count(value),
    "label_names": lambda value: value is None or _is_list_of(lambda name: isinstance(name, str))(value),
    "num_processes": lambda value: _is_count(value, 1),
    "unlogged": _is_list_of(_is_list_of(_is_number)),
    "grad_scaler": lambda value: value is None or isinstance(value, dict),
    "config": _is_config,
    "clock": _is_clock,
}


def load_checkpoint(folder: Path) -> TrainingState:
    """Read a checkpoint.

    Raises:
        ValueError: for a folder that is no checkpoint, or in which a file is missing or differs from its hash.
    """
    check_intact(folder)
    progress = read_progress(folder)
    try:
        files = (f"{STATE}/weights.safetensors", f"{STATE}/optimizer.safetensors", PIPELINE_WEIGHTS)
        weights, optimizer, ema = (load_file(folder / name) for name in files)
        others = folder / STATE / AVERAGES
        averages = load_file(others) if others.is_file() else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return TrainingState(progress, weights, optimizer, ema, averages)


def check_intact(folder: Path) -> None:
    """Raise a ValueError, naming the file, unless every file of the manifest exists and is unchanged."""
    manifest_file = folder / MANIFEST
    if not manifest_file.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it has no {MANIFEST}.")
    manifest = read_json(manifest_file)
    if not isinstance(manifest, dict):
        raise ValueError(f"{manifest_file} is damaged: it is not a mapping of files to hashes.")
    for name, digest in manifest.items():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{manifest_file} is damaged: {name} lies outside of the checkpoint.")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is damaged: {name} is missing.")
        if _sha256(folder / name) != digest:
            raise ValueError(f"{folder} is damaged: {name} differs from its hash in {MANIFEST}.")


def latest_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a folder, and why newer ones were skipped."""
    skipped = []
    for step in reversed(checkpoint_steps(output_dir)):
        folder = output_dir / f"checkpoint-{step}"
        try:
            check_intact(folder)
        except ValueError as error:
            skipped.append(str(error))
        else:
            return folder, skipped
    return None, skipped


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
