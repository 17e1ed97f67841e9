"""The image sets of `recipes.py` as folders of PNGs: `train/` for all peers, `held_out/` for likelihoods and copies."""

import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

MAX_TRAIN, MAX_HELD_OUT = 10_000, 1000
CROPS, CROP_SIZES = 120, (48, 160)  # of each picture; their sides in pixels, resized to 32


@dataclass(frozen=True)
class ImageSet:
    """What a recipe has to know of a set, and how it is measured."""

    resolution: int
    channels: int
    extractor: str  # trained on other images


SETS = {
    "digits": ImageSet(16, 1, "photographs"),
    "fashion": ImageSet(16, 1, "photographs"),
    "cifar": ImageSet(32, 3, "pictures"),
    "pictures": ImageSet(32, 3, "photographs"),
}


def digits() -> Iterator[Image.Image]:
    """scikit-learn's 1,797 scans of 8×8."""
    for scan in load_digits().images:
        yield Image.fromarray((scan * 255 / 16).round().astype(np.uint8))


def fashion(folder: Path) -> Iterator[Image.Image]:
    """The first images of Fashion-MNIST's training set, from a folder of its idx files."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz") as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    yield from map(Image.fromarray, pixels)


def cifar(file: Path) -> Iterator[tuple[Image.Image, int]]:
    """Photographs and their classes, from a parquet file with the columns `image` and `label`."""
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
        for row in batch.to_pylist():
            yield Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), row["label"]


def pictures() -> Iterator[tuple[Image.Image, int]]:
    """Random crops of the colour pictures that scikit-learn and scikit-image ship, and which picture each is from."""
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("The set `pictures` needs scikit-image, for the pictures that it ships: pip install it.")
    for file in sorted((Path(spec.origin).parent / "data").glob("*")):
        if file.suffix in (".png", ".jpg"):
            picture = Image.open(file)
            if picture.mode == "RGB" and min(picture.size) >= CROP_SIZES[1]:
                whole.append(picture)
    draw = np.random.default_rng(0)
    for _ in range(CROPS):
        for number, picture in enumerate(whole):
            side = int(draw.integers(*CROP_SIZES))
            left, top = (int(draw.integers(length - side + 1)) for length in picture.size)
            yield picture.crop((left, top, left + side, top + side)), number


def write_set(name: str, folder: Path, fashion_folder: Path, cifar_file: Path | None) -> None:
    """Write a set's folders, unless they exist. A sixth of the images is held out, at most MAX_HELD_OUT.

    Files of labelled sets lie in a sub-folder for each class, so that an extractor can be trained on them.
    """
    if (folder / "held_out").is_dir():
        return
    if name == "cifar" and cifar_file is None:
        raise SystemExit(
            "The photographs are missing: pass --cifar FILE.parquet, with the columns `image` and `label`."
        )
    images = {
        "digits": digits,
        "fashion": lambda: fashion(fashion_folder),
        "cifar": lambda: cifar(cifar_file or Path()),
        "pictures": pictures,
    }[name]()
    size = SETS[name].resolution
    prepared = []
    for item in images:
        image, label = item if isinstance(item, tuple) else (item, 0)
        prepared.append((image.resize((size, size), Image.Resampling.BICUBIC), label))
        if len(prepared) == MAX_TRAIN + MAX_HELD_OUT:
            break
    order = np.random.default_rng(0).permutation(len(prepared))
    held_out = min(MAX_HELD_OUT, len(order) // 6)
    for part, chosen in (("train", order[held_out:]), ("held_out", order[:held_out])):
        for number, i in enumerate(chosen):
            image, label = prepared[i]
            place = folder / part / f"class{label:02d}"
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number:05d}.png")
