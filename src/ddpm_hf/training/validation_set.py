"""The images that a model is measured on during training: from another split, or held out of the training set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import Batch, Images, IndexedImages, transform_of
from ..data.decoding import decode_rows, decode_stream_rows
from ..data.pixels import normalize, to_uint8
from ..data.sources import Source, Stream, open_source, open_stream

if TYPE_CHECKING:
    from ..config.training import TrainConfig

NO_HELD_OUT_STREAM = (
    "`eval_steps` needs held-out images, which a stream can't set aside: name another split with --eval_split, "
    "or leave out --streaming."
)
VALIDATION_SEED = 1  # beside the seed: not the random numbers that order an epoch


class ValidationSet(NamedTuple):
    """Held-out images, their labels, and as many images of the training set.

    `pixels` and `seen` are uint8 of shape (N, C, H, W), `labels` int64 of shape (N,), or None without labels.
    """

    pixels: Tensor
    labels: Tensor | None
    seen: Tensor


class RemainingImages(IndexedImages):
    """The images of `base` with these indices, in an order of their own."""

    def __init__(self, base: IndexedImages, indices: np.ndarray) -> None:
        super().__init__(base.name, base.label_names, base.skipped)
        self.base, self.kept, self.length = base, indices, len(indices)

    def read(self, requests: Iterable[np.ndarray]) -> Iterator[Batch]:
        """See `IndexedImages.read`."""
        return self.base.read(self.kept[request] for request in requests)


def num_held_out(config: TrainConfig) -> int:
    """How many images of the training set are held out."""
    return config.eval_images if config.eval_steps is not None and config.eval_split is None else 0


def open_eval_split(config: TrainConfig, training: Source | Stream) -> Source | Stream | None:
    """The split that validation images come from; None where they are held out of the training set, or not needed.

    Raises:
        ValueError: for a split that does not exist or has too few images, and for labels that training lacks.
    """
    if config.eval_steps is None:
        return None
    if config.eval_split is None:
        _check_enough_remain(config, training)
        return None
    try:
        split = (open_stream if config.streaming else open_source)(config, config.eval_split)
    except ValueError as error:
        raise ValueError(f"`eval_split` is {config.eval_split!r}: {error}") from error
    if isinstance(split, Source):
        _check_count(config, len(split))
    unknown = sorted(set(split.label_names or ()) - set(training.label_names or ()))
    if unknown:
        raise ValueError(
            f"`eval_split` is {config.eval_split!r}, but has labels that the training set lacks: {', '.join(unknown)}."
        )
    return split


def check_still_held_out(before: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise a ValueError if a resumed run would measure on images that were trained on before.

    Args:
        before: the options of the checkpoint.
    """
    if not num_held_out(config):
        return
    now = config.public()
    names = ("eval_images", "seed", "eval_split")
    changed = [f"--{name} was {before.get(name)!r}" for name in names if before.get(name) != now[name]]
    if before.get("eval_steps") is None:
        changed = ["there was no --eval_steps"]
    if changed:
        raise ValueError(
            f"images that were trained on can't be held out, and {' and '.join(changed)} before: resume with the same "
            "options, name another split with --eval_split, or start a new run."
        )


def make_validation_set(
    config: TrainConfig, images: Images, split: Source | Stream | None
) -> tuple[Images, ValidationSet | None]:
    """Divide the images of a run into those to train on and those to measure on, by its seed.

    Args:
        split: what `open_eval_split` has opened.

    Returns:
        The images to train on, and the validation set: None without `eval_steps`.

    Raises:
        ValueError: for too few images, or those that can't be read.
    """
    if config.eval_steps is None:
        return images, None
    n, rng = config.eval_images, np.random.default_rng([config.seed, 0, VALIDATION_SEED])
    if split is not None:
        pixels, labels = _read_split(config, split, images.label_names, rng)
    else:
        if not isinstance(images, IndexedImages):
            raise ValueError(NO_HELD_OUT_STREAM)
        order = rng.permutation(len(images))
        pixels, labels = next(images.read([np.sort(order[:n])]))
        images = RemainingImages(images, np.sort(order[n:]))
    seen = images.sample(len(pixels), config.seed)
    return images, ValidationSet(to_uint8(normalize(pixels)), labels, to_uint8(normalize(seen)))


def _read_split(
    config: TrainConfig, split: Source | Stream, label_names: list[str] | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor | None]:
    n, transform = config.eval_images, transform_of(config)
    if isinstance(split, Stream):
        decoded = decode_stream_rows(transform, n, split.first_rows(n, config.seed))
    else:
        decoded = decode_rows(split, transform, np.sort(rng.permutation(len(split))[:n]).tolist())
    if decoded.unreadable and config.on_bad_image == "raise":
        raise decoded.unreadable[0].error(f"{split.name}, split {config.eval_split}")
    if len(decoded.pixels) + len(decoded.unreadable) < n or not len(decoded.pixels):
        _check_count(config, len(decoded.pixels))
    labels = decoded.labels
    if labels is not None and label_names is not None:  # the split may lack some, and number the others differently
        labels = torch.tensor([label_names.index(name) for name in split.label_names or ()])[labels]
    return decoded.pixels, labels


def _check_enough_remain(config: TrainConfig, training: Source | Stream) -> None:
    if isinstance(training, Stream):
        raise ValueError(NO_HELD_OUT_STREAM)
    if 2 * config.eval_images > len(training):
        raise ValueError(
            f"`eval_images` is {config.eval_images}, but there are only {len(training)} images, of which at most half "
            "may be held out: lower it, or name another split with --eval_split."
        )


def _check_count(config: TrainConfig, found: int) -> None:
    if found < config.eval_images:
        raise ValueError(
            f"`eval_images` is {config.eval_images}, but the split {config.eval_split!r} has {found} images: lower it."
        )
