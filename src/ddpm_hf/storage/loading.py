"""Models from a folder, a training checkpoint, a checkpoint of the stock script, or the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from ..diffusion.ddpm_labels import label_names
from ..diffusion.ddpm_process import MAX_TIMESTEPS
from ..diffusion.pipeline import DDPMPipelineCustom
from .checkpoint import MANIFEST, check_intact, checkpoint_steps, latest_checkpoint
from .files import read_json

MAX_CONFIG_BYTES = 20_000_000  # a calibration of T = 1000 takes 70 kB
MAX_SCHEDULER = {"num_train_timesteps": MAX_TIMESTEPS}
MAX_NETWORK = {
    "sample_size": 65_536,
    "in_channels": 65_536,
    "out_channels": 65_536,
    "layers_per_block": 64,
    "block_out_channels": 65_536,
    "num_class_embeds": 10_000_000,
}


def load_pipeline(model: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> DDPMPipelineCustom:
    """A pipeline from a folder, a training checkpoint or the Hub.

    A training folder without a finished pipeline gives its newest intact checkpoint. Checkpoints of diffusers'
    `train_unconditional.py` load too: their EMA weights, with the scheduler of the folder around them.

    Raises:
        ValueError: if there is no such model, or it is damaged.
    """
    logging.disable_progress_bar()  # of diffusers, over two components
    folder = Path(model)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"`revision` is {revision!r}, but {model!r} is a folder: only models on the Hub have revisions."
            )
        with _damage_explained(model):
            return _complete(_load_folder(folder, dtype))
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ValueError(f"there is no model {model!r}: no such folder, and not a valid name on the Hub.") from error
    try:
        configurations = snapshot_download(
            model, revision=revision, allow_patterns=["model_index.json", "*config.json"]
        )
        with _damage_explained(model):
            _check_configurations(Path(configurations))
            return _complete(DDPMPipelineCustom.from_pretrained(model, revision=revision, dtype=dtype))
    except (OSError, HfHubHTTPError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"there is no model {model!r}: no such folder, and the Hub can't provide it ({reason}). For a private "
            "model, log in with `hf auth login`."
        ) from error


@contextmanager
def _damage_explained(model: str) -> Iterator[None]:
    """Within this context, whatever diffusers raises for a damaged model is a ValueError of one line."""
    try:
        yield
    except Exception as error:
        says_so = isinstance(error, ValueError) and "expected shape" not in str(error)
        if says_so or (isinstance(error, (OSError, HfHubHTTPError)) and not Path(model).is_dir()):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"the model in {model!r} is damaged ({reason}): save or download it again.") from error


def _complete(pipeline: DDPMPipelineCustom) -> DDPMPipelineCustom:
    missing = next((name for name, weight in pipeline.unet.named_parameters() if weight.is_meta), None)
    if missing is not None:
        raise RuntimeError(f"its weights have no {missing}")
    return pipeline


def _check_configurations(folder: Path) -> None:
    """Refuse configurations that no model has, before anything is built from them.

    Raises:
        ValueError: names the file and the value.
    """
    for file in (folder / "model_index.json", *folder.glob("*/*config.json")):
        if not file.is_file():
            continue
        try:
            config = read_json(file, MAX_CONFIG_BYTES)
        except ValueError as error:
            raise ValueError(f"{error} Save or download the model again.") from error
        if not isinstance(config, dict):
            raise ValueError(f"{str(file)!r} is damaged (no mapping): save or download the model again.")
        is_network = file.parent.name.startswith("unet")
        _check_sizes(file, config, MAX_NETWORK if is_network else MAX_SCHEDULER)
        if is_network:
            label_names(config)  # raises for any but names


def _check_sizes(file: Path, config: dict[str, Any], limits: dict[str, int]) -> None:
    for name, highest in limits.items():
        value = config.get(name)
        numbers = value if isinstance(value, list) else [] if value is None else [value]
        sound = len(numbers) <= 32 and all(type(v) is int and 0 <= v <= highest for v in numbers)
        if not sound:
            raise ValueError(
                f"{str(file)!r} has {name} = {value!r:.100}, but must have integers from 0 to {highest:,}."
            )


def _load_folder(folder: Path, dtype: torch.dtype) -> DDPMPipelineCustom:
    _check_configurations(folder)
    if (folder / "model_index.json").is_file():
        if (folder / MANIFEST).is_file():
            check_intact(folder)
        return DDPMPipelineCustom.from_pretrained(folder, dtype=dtype)
    if checkpoint_steps(folder):
        checkpoint, skipped = latest_checkpoint(folder)
        if checkpoint is None:
            raise ValueError(f"{str(folder)!r} has no intact checkpoint: {'; '.join(skipped)}")
        return DDPMPipelineCustom.from_pretrained(checkpoint, dtype=dtype)
    for name in ("unet_ema", "unet"):
        if (folder / name / "config.json").is_file():
            return _stock_checkpoint(folder, name, dtype)
    raise ValueError(
        f"{str(folder)!r} is a folder, but holds no model: neither a model_index.json nor a training checkpoint."
    )


def _stock_checkpoint(folder: Path, unet: str, dtype: torch.dtype) -> DDPMPipelineCustom:
    network = UNet2DModel.from_pretrained(folder, subfolder=unet, dtype=dtype)
    for place in (folder, folder.parent):
        if (place / "scheduler" / "scheduler_config.json").is_file():
            return DDPMPipelineCustom(network, DDPMScheduler.from_pretrained(place, subfolder="scheduler"))
    raise ValueError(
        f"{str(folder)!r} is a checkpoint of train_unconditional.py, which does not store its scheduler. Copy the "
        f"`scheduler` folder of the finished pipeline into {str(folder.parent)!r}."
    )


def stored_dtype(folder: Path) -> torch.dtype:
    """The precision of the weights in a folder; float32 if none can be read, which loading will report."""
    for file in sorted(folder.rglob("diffusion_pytorch_model*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                return weights.get_tensor(next(iter(weights.keys()))).dtype
        except (SafetensorError, OSError, StopIteration):
            continue
    return torch.float32
