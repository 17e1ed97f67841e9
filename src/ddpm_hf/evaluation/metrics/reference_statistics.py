"""What the quality of samples is measured against: the features of real images, computed once and cached."""

from __future__ import annotations

import hashlib
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .distances import Moments, moments
from .features import Extractor, check_images

MAX_STORED = 50_000  # features, as many as publications use; 400 MB of Inception's
VERSION = 1  # raise it whenever the same images would give other statistics

Key = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Args:
        moments: of the features of all images.
        features: float32 (M, D), of all images, or of 50,000 of them, evenly spaced.
        key: what they depend on: hash and shape of the pixels, extractor, version.
    """

    moments: Moments
    features: Tensor
    key: Key


def reference_statistics(
    images: Tensor,
    extractor: Extractor,
    *,
    pixels_hash: str | None = None,
    cache_dir: Path | None = None,
    batch_size: int = 64,
    show_progress: bool = True,
) -> Reference:
    """Statistics of real images, from the cache if they are there.

    Every process has all the images, and ends with the statistics. A damaged file is replaced, with a warning.

    Args:
        images: uint8 of shape (N, C, H, W), C 1 or 3, N at least 2.
        pixels_hash: their `hash_pixels`, if it is known already.
        cache_dir: a folder for files named by a hash; by default `ddpm_hf` in the cache of Hugging Face.
        batch_size: images per network call and process.
        show_progress: a progress bar on the main process.

    Raises:
        ValueError: for images of another kind, before anything is computed.
    """
    check_images(images)
    key = {
        "pixels": pixels_hash or hash_pixels(images),
        "shape": list(images.shape),
        "extractor": extractor.identity,
        "version": VERSION,
    }
    digest = hashlib.sha256(json.dumps(list(key.values())).encode()).hexdigest()[:24]
    file = Path(cache_dir or Path(HF_HOME) / "ddpm_hf") / f"reference-{digest}.safetensors"
    stored = _read(file, key) if file.exists() else None
    is_everywhere = all(gather_object([stored is not None]))  # caches differ between machines
    if stored is not None and is_everywhere:
        return stored
    features = extractor(images, batch_size, show_progress).pooled
    reference = Reference(moments(features), evenly_spaced(features, MAX_STORED), key)
    if PartialState().is_local_main_process:
        _write(reference, file)
    return reference


def hash_pixels(images: Tensor) -> str:
    """SHA-256 of the pixels of uint8 images, without their shape."""
    digest = hashlib.sha256()
    for batch in images.split(1000):
        digest.update(batch.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def evenly_spaced(rows: Tensor, limit: int) -> Tensor:
    """All rows, or `limit` of them from all over the table: data sets may be sorted by class."""
    if len(rows) <= limit:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, limit, dtype=torch.float64).long()]


def _read(file: Path, key: Key) -> Reference | None:
    """The statistics in a file; None, with a warning, if it is damaged or holds those of other images."""
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in ("mean", "covariance", "features")}
        found = json.loads(metadata["key"])
        if {name: found[name] for name in key} != key:
            raise ValueError("it holds the statistics of other images")
        if metadata["sha256"] != _hash(tensors):
            raise ValueError("its numbers are not those that were written")
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, RecursionError) as error:
        warnings.warn(f"{file} is damaged ({error}): the statistics are computed anew.", stacklevel=3)
        return None
    return Reference(Moments(tensors["mean"], tensors["covariance"], key["shape"][0]), tensors["features"], key)


def _write(reference: Reference, file: Path) -> None:
    """Write the file atomically. A failure costs time later, and nothing else."""
    tensors = {
        "mean": reference.moments.mean,
        "covariance": reference.moments.covariance,
        "features": reference.features.contiguous(),
    }
    metadata = {"key": json.dumps(reference.key), "sha256": _hash(tensors)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Not `write_atomically`: several evaluations share the folder, and would share its temporary file.
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            partial = Path(folder) / file.name
            save_file(tensors, partial, metadata)
            partial.replace(file)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"reference statistics can't be written to {file} ({error}): choose --cache_dir.", stacklevel=3)


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
