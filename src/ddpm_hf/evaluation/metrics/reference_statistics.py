"""What the quality of samples is measured against: the features of real images, computed once and kept."""

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

KEPT_FEATURES = 50_000  # as many as publications use; 400 MB of Inception's
CONTENT = ("pixels", "shape", "extractor", "version")  # of a key: the rest is what a person calls it
VERSION = 1  # raise it whenever the same images would give other statistics

Key = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """Statistics of real images.

    Args:
        moments: of the features of all images.
        features: float32 (M, D), of all images or 50,000 of them, spread evenly over the set.
        key: what they are of; see `reference_key`.
    """

    moments: Moments
    features: Tensor
    key: Key


def reference_key(images: Tensor, extractor: Extractor, *, dataset: str, split: str, resize: str) -> Key:
    """What statistics are of, as JSON knows it.

    Args:
        images: uint8 of shape (N, C, H, W), C 1 or 3. Their hash is what tells data sets apart.
        dataset: its name.
        split: which part of it.
        resize: how its images came to their size.
    """
    check_images(images)
    digest = hashlib.sha256()
    for batch in images.split(1000):
        digest.update(batch.cpu().contiguous().numpy().data)
    return {
        "dataset": dataset,
        "split": split,
        "resize": resize,
        "shape": list(images.shape),
        "pixels": digest.hexdigest(),
        "extractor": extractor.identity,
        "version": VERSION,
    }


def reference_statistics(
    images: Tensor,
    extractor: Extractor,
    *,
    dataset: str,
    split: str,
    resize: str,
    cache_dir: Path | None = None,
    file: Path | None = None,
    batch_size: int = 64,
    show_progress: bool = True,
) -> Reference:
    """Statistics of real images: from a file if there is one of just these, else computed, and kept in it.

    Every process has all the images, and ends with the statistics.

    Args:
        images: uint8 of shape (N, C, H, W), C 1 or 3, N at least 2.
        dataset: its name, `split` which part of it, and `resize` how its images came to their size.
        cache_dir: where such files are kept, named by a hash; by default `ddpm_hf` in the cache of Hugging Face. One
            that is damaged is made again, with a warning.
        file: one file instead, which is never replaced.
        batch_size: images per network call and process.
        show_progress: a progress bar on the main process.

    Raises:
        ValueError: before anything is computed, if `file` holds anything but the statistics of these images.
    """
    key = reference_key(images, extractor, dataset=dataset, split=split, resize=resize)
    place = Path(file) if file is not None else Path(cache_dir or Path(HF_HOME) / "ddpm_hf") / _file_name(key)
    reference = None
    if place.exists():
        try:
            reference = read_reference(place, key)
        except ValueError as error:
            if file is not None:
                raise
            warnings.warn(f"{error} The statistics are computed anew.", stacklevel=2)
    if not all(gather_object([reference is not None])):  # on some machine it is not there
        features = extractor(images, batch_size, show_progress).pooled
        reference = Reference(moments(features), evenly_spaced(features, KEPT_FEATURES), key)
        if PartialState().is_local_main_process:
            _keep(reference, place)
    assert reference is not None
    return reference


def evenly_spaced(rows: Tensor, limit: int) -> Tensor:
    """All rows, or `limit` of them from all over the table: data sets may be sorted by class."""
    if len(rows) <= limit:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, limit, dtype=torch.float64).long()]


def read_reference(file: Path, key: Key) -> Reference:
    """Read the statistics that `key` describes.

    Raises:
        ValueError: for a file that is damaged, or of other data; describes both.
    """
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata()
            found = json.loads(metadata["key"])
            tensors = {name: stored.get_tensor(name) for name in ("mean", "covariance", "features")}
        stored_as, asked_for = describe(found), describe(key)
    except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file} is no file of reference statistics, or damaged ({error}).") from error
    if any(found[name] != key[name] for name in CONTENT):
        raise ValueError(f"{file} holds statistics of {stored_as}, but those needed are of {asked_for}.")
    if metadata["sha256"] != _hash(tensors):
        raise ValueError(f"{file} is damaged: its numbers are not those that were written.")
    return Reference(Moments(tensors["mean"], tensors["covariance"], key["shape"][0]), tensors["features"], key)


def describe(key: Key) -> str:
    """What statistics are of, in words."""
    n, *shape = key["shape"]
    size = "×".join(map(str, shape))
    return (
        f"{key['dataset']}, {key['split']} ({n} images of {size}, resized by {key['resize']}, SHA-256 of the pixels "
        f"{key['pixels'][:16]}) by {key['extractor']}, version {key['version']}"
    )


def _keep(reference: Reference, file: Path) -> None:
    """Write the file, whole or not at all. That it can't be written costs time later, and nothing else."""
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
        warnings.warn(f"reference statistics can't be kept in {file} ({error}): choose --cache_dir.", stacklevel=3)


def _file_name(key: Key) -> str:
    content = json.dumps([key[name] for name in CONTENT])
    return f"reference-{hashlib.sha256(content.encode()).hexdigest()[:24]}.safetensors"


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()
