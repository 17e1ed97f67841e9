"""A saved repository: a pipeline that loads with this package, with none of ours (as remote code), and with stock.

Its `model_index.json` names stock classes of diffusers. The code that makes it ours lies beside it, this file included.
"""

from __future__ import annotations

import glob
import json
import os
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder

CODE_FILES = (
    "pipeline.py", "scheduling_ddpm_custom.py", "ddpm_few_steps.py", "ddpm_process.py", "ddpm_fast_network.py",
    "ddpm_labels.py", "ddpm_repository.py",
)  # fmt: skip

# What an evaluation leaves, beside samples: results, and plots for the card.
EVALUATION_FILES = (
    "metrics.json",
    "likelihood.json",
    "bits_per_dim.png",
    "rate_distortion.png",
    "nearest.png",
    "nearest_features.png",
)

# Pictures that show training images. They are shared only on request.
REAL_IMAGES = ("real.png", "samples_and_real.png", "nearest.png", "nearest_features.png", "report.html")
# All that is otherwise uploaded of a folder: no training state, no logs, whatever else lies there.
SHARED_FILES = (
    "model_index.json",
    *CODE_FILES,
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model*.safetensors",
    "unet/diffusion_pytorch_model*.safetensors.index.json",
    "README.md",
    "samples.png",
    "loss.png",
    *(name for name in EVALUATION_FILES if name not in REAL_IMAGES),
)


def complete_repository(folder: Path, has_custom_scheduler: bool) -> None:
    """Make a repository of what diffusers has saved: stock class names, no path of this machine, and the code.

    Args:
        has_custom_scheduler: whether the scheduler is a `DDPMSchedulerCustom`, which stock reads as a `DDPMScheduler`.
    """
    index_file = folder / "model_index.json"
    index = _read_config(index_file)
    if has_custom_scheduler:
        index["scheduler"] = ["diffusers", "DDPMScheduler"]
    index["_class_name"] = "DDPMPipeline"
    _write_config(index_file, index)
    unet_config = folder / "unet" / "config.json"
    if unet_config.is_file():
        _write_config(unet_config, _read_config(unet_config))
    here = Path(__file__).parent
    for name in CODE_FILES:
        _replace(folder / name, (here / name).read_bytes())
    # safetensors keeps weights to their owner, whatever the umask: give them the mode of other new files
    for weights in folder.glob("unet/*.safetensors"):
        weights.chmod(index_file.stat().st_mode)


def _read_config(file: Path) -> dict[str, Any]:
    """A configuration without the path that it was once loaded from."""
    config = json.loads(file.read_text("utf-8"))
    config.pop("_name_or_path", None)
    return config


def _write_config(file: Path, config: dict[str, Any]) -> None:
    _replace(file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def _replace(file: Path, content: bytes) -> None:
    """Write a file, or leave it as it is: a full disk harms no model that was complete."""
    if file.is_file() and file.read_bytes() == content:
        return
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def update_card(folder: Path, **facts: str) -> None:
    """Write the card, if this is the package; a copy of this file in a repository has no writer of cards."""
    if __name__ != "ddpm_hf.diffusion.ddpm_repository":
        return
    # Not by an import statement: diffusers checks those of a saved repository's code, and looks for these packages.
    card = import_module("ddpm_hf.sharing.card")
    try:
        card.write_card(folder, facts)
    except ValueError as error:  # a card edited by hand that can't be read is no reason to end a training
        warnings.warn(f"the model is saved, but not its card: {error}", stacklevel=5)


def upload_repository(folder: Path, repo_id: str, **options: Any) -> Any:
    """Upload what is to be shared of a folder, and nothing else that lies there. The options are `upload_folder`'s."""
    return upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        allow_patterns=list(SHARED_FILES),
        ignore_patterns=_links_outwards(folder),
        **options,
    )


def _links_outwards(folder: Path) -> list[str]:
    """Symbolic links in a folder to what lies elsewhere, which no upload follows."""
    root = folder.resolve()
    files = [p.relative_to(folder) for p in folder.rglob("*") if not p.resolve().is_relative_to(root)]
    return [glob.escape(file.as_posix()) for file in files]
