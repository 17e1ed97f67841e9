"""Images: any source → uint8 → [-1, 1]. The only place that knows image modes, resizing and the order of batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from .config import TrainConfig

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass
class Images:
    """A training set in memory. `pixels` is uint8 of shape (N, C, H, W)."""

    pixels: Tensor
    source: str
    _orders: dict[tuple[int, int], np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, first: int, size: int, seed: int, flip: bool = False) -> Tensor:
        """Images number first … first + size - 1 of the endless, shuffled stream, in [-1, 1].

        The stream is a function of `seed` alone: epoch after epoch, each image once per epoch, each epoch in its own
        order. So a run that goes on in the middle of an epoch sees what it would have seen. Flips are drawn from
        torch's global generator.

        Returns:
            float32 of shape (size, C, H, W).
        """
        epochs, places = np.divmod(np.arange(first, first + size), len(self))
        orders = {int(e): self.order(seed, int(e)) for e in np.unique(epochs)}
        indices = np.array([orders[int(e)][p] for e, p in zip(epochs, places, strict=True)])
        batch = to_unit_range(self.pixels[torch.from_numpy(indices)])
        if flip:
            flipped = torch.rand(size) < 0.5
            batch = torch.where(flipped[:, None, None, None], batch.flip(-1), batch)
        return batch

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of one epoch; the latest ones are kept."""
        if (seed, epoch) not in self._orders:
            if len(self._orders) > 2:
                self._orders.clear()
            self._orders[seed, epoch] = np.random.default_rng([seed, epoch]).permutation(len(self))
        return self._orders[seed, epoch]


def to_unit_range(pixels: Tensor) -> Tensor:
    """uint8 in [0, 255] → float32 in [-1, 1] (Section 3.3)."""
    return pixels.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] → uint8, rounded to the nearest of the 256 levels."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_images(config: TrainConfig, show_progress: bool = True) -> Images:
    """The training set of a configuration, decoded, resized and cropped.

    Raises:
        ValueError: for a source that does not exist, has no images, or has several image columns.
    """
    rng = None if config.center_crop else np.random.default_rng([config.seed, 1])
    if config.dataset_name == "digits":
        sources: Any = _digits()
        name = "scikit-learn digits"
    else:
        sources = _open_dataset(config)
        name = str(config.dataset_name or config.train_data_dir)
    if len(sources) == 0:
        raise ValueError(f"{name} holds no images.")
    pixels = np.empty((len(sources), config.channels, config.resolution, config.resolution), np.uint8)
    for i in tqdm(range(len(sources)), desc=f"Reading {name}", disable=not show_progress, leave=False):
        try:
            pixels[i] = prepare_image(sources[i], config.resolution, config.channels, rng)
        except (OSError, AttributeError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
            raise ValueError(f"image {i} (from 0) of {name} can't be read ({error}): repair or remove it.") from error
    return Images(torch.from_numpy(pixels), name)


def prepare_image(image: Image.Image, resolution: int, channels: int, rng: np.random.Generator | None) -> np.ndarray:
    """One image, upright, its shorter side resized to `resolution` and the longer one cropped, uint8 of (C, H, W).

    `rng` places the crop at random; None takes the centre.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers, whose range is unknown")
    if image.mode.startswith("I"):  # 16 or 32 bit: convert() would cut off instead of scaling
        values = np.asarray(image)
        image = Image.fromarray((values / (257 if values.max() > 255 else 1)).round().clip(0, 255).astype(np.uint8))
    image = image.convert(MODES[channels])
    scale = resolution / min(image.size)
    size = [max(resolution, round(side * scale)) for side in image.size]
    if tuple(size) != image.size:
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    spare = [size[0] - resolution, size[1] - resolution]
    left, top = [int(rng.integers(s + 1)) if rng is not None else s // 2 for s in spare]
    image = image.crop((left, top, left + resolution, top + resolution))
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _digits() -> list[Image.Image]:
    """scikit-learn's 1,797 scans of 8×8 pixels with 17 levels, as 8-bit grayscale images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn: pip install 'ddpm-hf[train]'.") from error
    return [Image.fromarray((scan * (255 / 16)).round().astype(np.uint8)) for scan in load_digits().images]


def _open_dataset(config: TrainConfig) -> Any:
    """The image column of a `datasets` source, decoding as it is read."""
    import datasets

    if config.train_data_dir is not None and not Path(config.train_data_dir).is_dir():
        raise ValueError(f"`train_data_dir` is {config.train_data_dir!r}, but there is no such folder.")
    try:
        if config.train_data_dir is not None:
            # All files are the training set, also those that `datasets` would take for a test set by their names.
            files = {"train": str(Path(config.train_data_dir) / "**")}
            dataset = datasets.load_dataset(
                "imagefolder", data_files=files, cache_dir=config.cache_dir, split="train", drop_labels=True
            )
        elif config.dataset_name is not None and Path(config.dataset_name).suffix in (".parquet", ".arrow"):
            builder = Path(config.dataset_name).suffix.removeprefix(".")
            dataset = datasets.load_dataset(
                builder, data_files=config.dataset_name, cache_dir=config.cache_dir, split="train"
            )
        else:
            dataset = datasets.load_dataset(
                config.dataset_name, config.dataset_config_name, cache_dir=config.cache_dir, split="train"
            )
    except (FileNotFoundError, datasets.exceptions.DatasetsError, ValueError) as error:
        source = config.train_data_dir or config.dataset_name
        raise ValueError(f"no images can be read from {source!r}: {error}") from error
    image_columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    column = config.image_column or (image_columns[0] if len(image_columns) == 1 else None)
    if column not in image_columns:
        raise ValueError(
            f"`image_column` is {config.image_column!r}, but the image columns are {image_columns}: "
            "pass --image_column with one of them."
        )
    return dataset[column]
