"""The real images that a model is measured against, at its size and with its channels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..config.commands import EvaluateConfig, ImageOptions
from ..config.training import TrainConfig
from ..data.dataset import StoredImages, load_images
from ..data.sources import Source, open_source, public_name
from ..data.transform import image_format
from ..diffusion.ddpm_labels import label_names
from ..sampling.generate import parse_labels
from .metrics.reference_statistics import hash_pixels


@dataclass(frozen=True)
class RealImages:
    """A set of real images.

    Args:
        name: of the data, without a path of this machine.
        hub_id: its id, if it is a dataset of the Hub.
        split: `train`, or the split that the model has not seen.
        pixels: uint8 (N, C, H, W).
        labels: int64 (N,), as the network numbers them, if there is a label column.
        classes: the labels of the network that the label column has.
        preparation: how files became pixels.
        notes: changes to the images that a reader of results should know of.
    """

    name: str
    hub_id: str | None
    split: str
    pixels: Tensor
    labels: Tensor | None
    classes: list[int] | None
    preparation: dict[str, Any]
    notes: tuple[str, ...]

    @cached_property
    def pixels_hash(self) -> str:
        """See `hash_pixels`."""
        return hash_pixels(self.pixels)

    def identity(self) -> dict[str, Any]:
        """All that a result depends on, in types of JSON."""
        return {
            "name": self.name, "hub_id": self.hub_id, "split": self.split, "images": len(self.pixels),
            "hash": self.pixels_hash[:16], **self.preparation,
        }  # fmt: skip


def loading_config(network: UNet2DModel, options: ImageOptions, seed: int) -> TrainConfig:
    """The options that load images at the size of a network, and with its channels.

    Raises:
        ValueError: for a network of images that are not square, or of unknown size.
    """
    size = network.config.sample_size
    if not isinstance(size, int):
        raise ValueError(f"the network's sample_size is {size}, but real images are loaded as squares of a known size.")
    return TrainConfig(
        dataset_name=options.dataset_name,
        dataset_config_name=options.dataset_config_name,
        train_data_dir=options.train_data_dir,
        cache_dir=options.cache_dir,
        image_column=options.image_column,
        label_column=options.label_column,
        resolution=size,
        channels=network.config.in_channels,
        center_crop=options.center_crop,
        seed=seed,
    )


def load_real_images(
    network: UNet2DModel, config: EvaluateConfig, show_progress: bool
) -> tuple[RealImages, RealImages | None]:
    """The training images of a model, and the images that it has not seen, if the options name any.

    Raises:
        ValueError: for sets that do not exist, can't be read, or are empty; for unseen images that are training images.
    """
    images = loading_config(network, config, config.seed)
    train = _load(network, images, "train", "train", show_progress)
    if config.test_data_dir is not None:
        folder = replace(images, dataset_name=None, train_data_dir=config.test_data_dir)
        return train, _unseen(train, _load(network, folder, "train", "test", show_progress), "test_data_dir")
    if config.test_split is not None:
        split = config.test_split
        return train, _unseen(train, _load(network, images, split, split, show_progress), "test_split")
    return train, None


def _unseen(train: RealImages, other: RealImages, option: str) -> RealImages:
    """The other images, with a note if some of them are training images; raises a ValueError if all are."""
    known = set(_image_hashes(train.pixels))
    seen = sum(image in known for image in _image_hashes(other.pixels))
    if seen == len(other.pixels):
        raise ValueError(
            f"`{option}` names {seen:,} images, but all of them are training images: name images that the model has "
            f"not seen, or leave --{option} out."
        )
    if not seen:
        return other
    note = f"{seen:,} of the {len(other.pixels):,} images of {other.name} ({other.split}) are training images, too"
    return replace(other, notes=(*other.notes, note))


def _image_hashes(pixels: Tensor) -> Iterator[bytes]:
    return (hashlib.sha256(image.contiguous().numpy()).digest() for image in pixels)


def _load(network: UNet2DModel, config: TrainConfig, split: str, title: str, show_progress: bool) -> RealImages:
    source = open_source(config, split)
    images = load_images(config, source, show_progress)
    if not isinstance(images, StoredImages):
        raise ValueError(
            f"the {len(images):,} decoded images of {source.name} do not fit on the disk of the cache: pass "
            "--cache_dir FOLDER on a larger one."
        )
    name, hub_id = public_name(config, source.name)
    crop = "centre" if config.center_crop else f"seed {config.seed}"
    preparation = {"resolution": config.resolution, "mode": config.image_mode, "resize": config.resize, "crop": crop}
    return RealImages(
        name, hub_id, title, images.pixels, labels_of_network(images.labels, images.label_names, network),
        _places(images.label_names, network), preparation, image_notes(source, config),
    )  # fmt: skip


def labels_of_network(labels: Tensor | None, names: Sequence[str] | None, network: UNet2DModel) -> Tensor | None:
    """Labels of a data set, by their names there, as the network numbers them. The set may lack some of its classes.

    Args:
        labels: int64 (N,).
        names: of the labels of the data set.

    Raises:
        ValueError: for a name that the network does not know.
    """
    places = _places(names, network)
    return labels if labels is None or places is None else torch.tensor(places)[labels]


def _places(names: Sequence[str] | None, network: UNet2DModel) -> list[int] | None:
    if names is None:
        return None
    return parse_labels(names, network.config) if label_names(network.config) else list(range(len(names)))


def image_notes(source: Source, config: TrainConfig) -> tuple[str, ...]:
    """How the first image is changed, other than by making it smaller."""
    stored = image_format(source.read([0])[0])
    if stored is None:
        return ()
    width, height, mode = stored
    notes = [note.rstrip(".") for note in source.notes]
    if min(width, height) < config.resolution:
        notes.append(
            f"the images of {source.name} are {width}×{height}, and enlarged to the model's "
            f"{config.resolution}×{config.resolution}"
        )
    if mode != config.image_mode:
        notes.append(
            f"the images of {source.name} are of mode {mode}, and converted to the model's {config.image_mode}"
        )
    return tuple(notes)
