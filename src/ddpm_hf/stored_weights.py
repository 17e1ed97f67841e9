"""The weights in a saved pipeline's folder, and which figures and pictures there were measured with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from .pipeline import EVALUATION_FILES
from .sampling import hash_weights


def weights_digest(folder: Path) -> str:
    """A hash that tells one set of weights from another."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("unet/*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def evaluation_files(folder: Path) -> list[str]:
    """The files that evaluations of the very weights in a folder have left there, `metrics.json` first.

    Training on leaves those of the earlier weights, and an evaluation of some metrics the pictures of the others.
    """
    try:
        figures = json.loads((folder / "metrics.json").read_text("utf-8"))["figures"]
        measured = {figure["settings"]["chain"]["weights"] for figure in figures}
        names = {"metrics.json"}.union(*(_files_of(figure) for figure in figures))
    except (OSError, ValueError, TypeError, KeyError):  # never evaluated, or somebody's own file
        return []
    if measured != {_values_digest(folder)}:
        return []
    return [name for name in EVALUATION_FILES if name in names and (folder / name).is_file()]


def _files_of(figure: dict[str, Any]) -> list[str]:
    """What is written beside a figure."""
    settings = figure["settings"]
    if figure["metric"] == "nearest":
        return ["nearest_features.png" if settings.get("extractor") else "nearest.png"]
    if figure["metric"] == "bpd":
        curve = [] if settings.get("calls_per_image") else ["rate_distortion.png"]  # an estimate leaves timesteps out
        return ["likelihood.json", "bits_per_dim.png", *curve]
    return []


def _values_digest(folder: Path) -> str:
    """The hash of the weights as they load, which does not depend on how they are stored."""
    return hash_weights(UNet2DModel.from_pretrained(folder, subfolder="unet"))
