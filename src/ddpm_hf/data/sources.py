"""Where images come from: everything that `datasets` opens, as rows that are not decoded yet."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ..config.training import TrainConfig

FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
ARCHIVES = (".zip", ".gz", ".tgz", ".7z", ".rar")
METADATA_SUFFIXES = (".csv", ".jsonl", ".parquet")
OTHER_SPLITS = ("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev")
NO_PICTURES = (".pdf", ".mpg", ".mpeg", ".hdf", ".h5", ".bufr", ".grib")  # known to Pillow, but not read by it


@dataclass(frozen=True)
class Source:
    """Images that can be read in any order.

    Args:
        name: for messages.
        fingerprint: changes with the content; None if decoding everything is too quick to be cached.
        length: N, the number of images.
        read: maps indices to rows, as `transform.decode` takes them.
        labels: 0 … n - 1, int64 of shape (N,).
        label_names: the names of these n labels.
        notes: what the user should know, e.g. which files were left out.
        classes: a column of classes and their names, where the data set declares one, whether it is used or not.
    """

    name: str
    fingerprint: str | None
    length: int
    read: Callable[[Sequence[int]], list[Any]]
    labels: np.ndarray | None = None
    label_names: list[str] | None = None
    notes: tuple[str, ...] = ()
    classes: tuple[str, list[str]] | None = None

    def __len__(self) -> int:
        return self.length


class StreamRow(NamedTuple):
    """A row of a stream: its position there, what `transform.decode` takes, and its label if the run has labels."""

    position: int
    raw: Any
    label: int | None


@dataclass(frozen=True)
class Stream:
    """Images that are read one after the other, epoch after epoch, shuffled within a buffer of `buffer_size` rows."""

    name: str
    dataset: Any
    image_column: str
    label_column: str | None
    label_names: list[str] | None
    buffer_size: int
    classes: tuple[str, list[str]] | None = None

    def rows(self, first: int, seed: int) -> Iterator[StreamRow]:
        """The endless stream from row `first` on, a function of the seed.

        Earlier rows of the same epoch are read but not decoded. So is all of the first epoch if `first` lies in a later
        one, because only reading shows how long an epoch is.
        """
        epoch, to_skip, position = 0, first, first
        while True:
            length = 0
            with _clear_errors(self.name):
                for row in self._epoch(epoch, seed):
                    length += 1
                    if length > to_skip:
                        yield StreamRow(position, row[self.image_column], self._label(row))
                        position += 1
            to_skip = max(0, to_skip - length)
            epoch, to_skip = epoch + 1 + to_skip // length, to_skip % length

    def first_rows(self, count: int, seed: int) -> list[StreamRow]:
        """The first `count` rows of the first epoch, or all of them if there are fewer."""
        with _clear_errors(self.name):
            rows = islice(self._epoch(0, seed), count)
            return [StreamRow(i, row[self.image_column], self._label(row)) for i, row in enumerate(rows)]

    def _epoch(self, epoch: int, seed: int) -> Any:
        shuffled = self.dataset.shuffle(seed=seed, buffer_size=self.buffer_size)
        shuffled.set_epoch(epoch)
        return shuffled

    def _label(self, row: dict[str, Any]) -> int | None:
        if self.label_column is None:
            return None
        label = row[self.label_column]
        if label is None or label < 0:
            raise ValueError(f"`label_column` is {self.label_column!r}, but a row has no label")
        return label


def open_source(config: TrainConfig, split: str = "train") -> Source:
    """The training set of a configuration, or another split of its dataset. Nothing is decoded yet.

    Raises:
        ValueError: for a source that does not exist or can't be reached, for columns that it lacks, for no images.
    """
    if config.dataset_name == "digits":
        if split != "train":
            raise ValueError(f"the digits have no split {split!r}: leave it out.")
        return _digits(config)
    name = _name(config)
    notes: list[str] = []
    dataset = _load(config, split, notes)
    if len(dataset) == 0:
        raise ValueError(f"{name} holds no images.")
    column = _image_column(dataset, config)
    fingerprint = dataset._fingerprint
    labels, label_names = None, None
    if config.label_column is not None:
        labels, label_names = _labels(dataset, config.label_column)
    rows = _undecoded(dataset, column).select_columns(column)
    if rows[0][column] is not None and rows[0][column]["bytes"] is None:
        fingerprint += _files_fingerprint(row["path"] for part in rows.iter(1000) for row in part[column] if row)
    return Source(
        name,
        f"{fingerprint}-{column}",
        len(dataset),
        partial(_read_column, rows, column),
        labels,
        label_names,
        tuple(notes),
        _classes(dataset),
    )


def open_stream(config: TrainConfig, split: str = "train") -> Stream:
    """The training set of a configuration, or another split of its dataset, as a stream of rows.

    Raises:
        ValueError: as for `open_source`, and for labels of unknown number.
    """
    import datasets

    dataset = _load(config, split, [])
    label_names = None
    if config.label_column is not None:
        feature = _feature(dataset, config.label_column)
        if not isinstance(feature, datasets.ClassLabel):
            raise ValueError(
                f"`label_column` is {config.label_column!r}, which is {feature}: the number of labels in a stream is "
                "unknown. Store the column as ClassLabel, or leave out --streaming."
            )
        label_names = list(feature.names)
    column, name, classes = _image_column(dataset, config), _name(config), _classes(dataset)
    dataset = _undecoded(dataset, column)
    with _clear_errors(name):
        if not list(dataset.take(1)):
            raise ValueError("there are no rows")
    return Stream(name, dataset, column, config.label_column, label_names, config.shuffle_buffer_size, classes)


def public_name(config: TrainConfig, source: str) -> tuple[str, str | None]:
    """A name of the data for the public, and its id if it is a dataset on the Hub.

    Args:
        source: the name of its `Source`. Of a path, only the last part is published.
    """
    name = config.dataset_name
    if name is None or name == "digits" or Path(name).exists() or Path(name).suffix != "" or "*" in name:
        return Path(source).name, None
    return source, name


def _name(config: TrainConfig) -> str:
    return str(config.dataset_name or config.train_data_dir)


@contextmanager
def _clear_errors(name: str) -> Iterator[None]:
    """Turn whatever the Hub's client, the network or a file format raises into one line that names the source."""
    import datasets

    try:
        yield
    except Exception as error:
        hidden = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
        text = " ".join(str(hidden or error).split()) or type(error).__name__
        raise ValueError(f"no images can be read from {name!r}: {text}") from error


def _load(config: TrainConfig, split: str, notes: list[str]) -> Any:
    """A `Dataset`, or an `IterableDataset` for streaming. What the user should know is added to `notes`."""
    import datasets

    folder = config.train_data_dir
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"`train_data_dir` is {folder!r}, but there is no such folder.")
    options: dict[str, Any] = {"cache_dir": config.cache_dir, "split": split, "streaming": config.streaming}
    with _clear_errors(_name(config)):
        if folder is not None:
            listed = image_folder(Path(folder), config.label_column, notes)
            return listed.to_iterable_dataset() if config.streaming else listed
        path = Path(str(config.dataset_name))
        if path.suffix.lower() in ARCHIVES:
            raise ValueError("it is an archive: unpack it, and pass the folder as --train_data_dir")
        if path.suffix in FILE_BUILDERS:
            if "://" not in str(config.dataset_name) and not glob.glob(str(path)):  # noqa: PTH207  (may be absolute)
                raise ValueError(f"no file matches it in {Path.cwd()}")
            return datasets.load_dataset(FILE_BUILDERS[path.suffix], data_files=str(path), **options)
        if (path / "dataset_dict.json").is_file():
            path /= split
        if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
            saved = datasets.load_from_disk(str(path))
            return saved.to_iterable_dataset() if config.streaming else saved
        return datasets.load_dataset(config.dataset_name, config.dataset_config_name, **options)


def image_folder(folder: Path, label_column: str | None, notes: list[str]) -> Any:
    """A `Dataset` of the paths of all images in a folder and its sub-folders, in alphabetical order.

    Images are what Pillow opens, whatever the extension. A folder with the splits of a dataset as sub-folders (`train`
    and `test`, say) stands for its `train`. Labels are those of a metadata file (`metadata.csv`, `.jsonl` or
    `.parquet`, as in `datasets`) if it has such a column, or else, for `label`, the names of the sub-folders.

    Raises:
        ValueError: for a folder without images, or without such labels.
    """
    import datasets

    if (folder / "train").is_dir() and any((folder / name).is_dir() for name in OTHER_SPLITS):
        notes.append(f"Only {folder / 'train'} is read: the folder has other splits beside it.")
        folder /= "train"
    found, linked = [], []
    for path in sorted(p for p in folder.rglob("*") if not _is_hidden(p.relative_to(folder))):
        if path.is_file():
            found.append(path)
        elif path.is_symlink():
            linked.append(path)
    if linked:
        number = "1 link" if len(linked) == 1 else f"{len(linked):,} links"
        notes.append(f"Not followed: {number} to a folder or to nothing, e.g. {linked[0]}.")
    metadata: list[Path] = []
    images: list[Path] = []
    ignored: list[Path] = []
    for file in found:
        is_metadata = file.stem == "metadata" and file.suffix in METADATA_SUFFIXES
        (metadata if is_metadata else images if _is_image(file) else ignored).append(file)
    if not images:
        if not ignored:
            raise ValueError(f"the folder has no files{'. ' if linked else ''}{' '.join(notes)}".removesuffix("."))
        number = "1 file of another kind" if len(ignored) == 1 else f"{len(ignored):,} files of other kinds"
        raise ValueError(f"the folder has {number} ({_kinds(ignored)}), but no images")
    if ignored:
        files = "1 file that is no image" if len(ignored) == 1 else f"{len(ignored):,} files that are not images"
        notes.append(f"Ignored: {files} ({_kinds(ignored)}), e.g. {ignored[0]}.")
    columns: dict[str, Any] = {"image": [str(p) for p in images]}
    if metadata and label_column is not None:
        pattern = glob.escape(str(folder)) + "/**"
        dataset = datasets.load_dataset("imagefolder", data_files={"train": pattern}, split="train")
        if label_column in dataset.features:
            if len(dataset) < len(images):
                notes.append(f"Ignored: {len(images) - len(dataset):,} images that {metadata[0]} does not list.")
            return dataset
    if label_column is not None:
        columns["label"] = [p.parent.name if p.parent != folder else None for p in images]
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    if label_column is not None and None not in columns["label"]:
        dataset = dataset.cast_column("label", datasets.ClassLabel(names=sorted(set(columns["label"]))))
    return dataset.cast_column("image", datasets.Image())


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts) or file.name in ("Thumbs.db", "desktop.ini")


def _is_image(file: Path) -> bool:
    """Whether the name says so, or else the first bytes do."""
    if file.suffix.lower() in Image.registered_extensions():
        return file.suffix.lower() not in NO_PICTURES
    try:
        with Image.open(file):
            return True
    except (OSError, ValueError, SyntaxError):
        return False


def _kinds(files: Sequence[Path]) -> str:
    """The extensions of files, the most frequent first."""
    counts = Counter(p.suffix.lower() or "without extension" for p in files)
    return ", ".join(kind for kind, _ in counts.most_common(5))


def _feature(dataset: Any, column: str) -> Any:
    if column not in dataset.features:
        raise ValueError(f"`label_column` is {column!r}, but the columns are {list(dataset.features)}.")
    return dataset.features[column]


def _image_column(dataset: Any, config: TrainConfig) -> str:
    """The column of `image_column`, or else the only one that holds images."""
    import datasets

    found = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    column = config.image_column or (found[0] if len(found) == 1 else None)
    if column is None or column not in dataset.features:
        if found:
            raise ValueError(
                f"`image_column` is {column!r}, but the image columns are {found}: pass --image_column with one of "
                "them."
            )
        kinds = ", ".join(f"{name} ({getattr(f, 'dtype', None) or 'struct'})" for name, f in dataset.features.items())
        raise ValueError(
            f"`image_column` is {column!r}, but no column is declared as images; the columns are {kinds}: pass "
            "--image_column with the one that holds encoded images (binary, or a struct of bytes and path)."
        )
    return column


def _undecoded(dataset: Any, column: str) -> Any:
    """The dataset with bytes and paths in place of images, so that a damaged image can be named and skipped."""
    import datasets

    feature = dataset.features[column]
    encoded = isinstance(feature, datasets.Image) or (isinstance(feature, dict) and {"bytes", "path"} >= set(feature))
    if not encoded and getattr(feature, "dtype", None) not in ("binary", "large_binary"):
        raise ValueError(f"`image_column` is {column!r}, but that column holds {feature}, not images.")
    return dataset.cast_column(column, datasets.Image(decode=False))


def _classes(dataset: Any) -> tuple[str, list[str]] | None:
    """The first column that is declared as classes, and their names."""
    import datasets

    found = [(name, f.names) for name, f in dataset.features.items() if isinstance(f, datasets.ClassLabel)]
    return found[0] if found else None


def _labels(dataset: Any, column: str) -> tuple[np.ndarray, list[str]]:
    """Labels 0 … n - 1 and their names: those of a ClassLabel, or else the sorted values."""
    import datasets

    feature = _feature(dataset, column)
    values = dataset[column][:]
    missing = [i for i, value in enumerate(values) if value is None]
    if isinstance(feature, datasets.ClassLabel):
        missing += [i for i, value in enumerate(values) if value == -1]  # not labeled, in `datasets`
    if missing:
        raise ValueError(
            f"`label_column` is {column!r}, but {len(missing)} rows have no label, first row {missing[0]}."
        )
    if isinstance(feature, datasets.ClassLabel):
        return np.asarray(values, np.int64), list(feature.names)
    if not all(isinstance(value, (int, str)) for value in values):
        raise ValueError(f"`label_column` is {column!r}, which is {feature}, but must be ClassLabel, integers or text.")
    names, labels = np.unique(values, return_inverse=True)
    if len(values) > 1 and len(names) == len(values):
        raise ValueError(
            f"`label_column` is {column!r}, but each of the {len(values)} images has a label of its own, such as "
            f"{str(names[0])[:60]!r}: pass a column of classes."
        )
    return labels.astype(np.int64), [str(name) for name in names]


def _read_column(rows: Any, column: str, indices: Sequence[int]) -> list[Any]:
    return rows[indices][column]


def _files_fingerprint(paths: Iterator[str]) -> str:
    """A hash of the names, sizes and times of files."""
    digest = hashlib.sha256()
    for path in paths:
        found = None
        with suppress(OSError):
            stat = os.stat(path)  # noqa: PTH116  (three times as fast as a Path's)
            found = (stat.st_size, stat.st_mtime_ns)
        digest.update(f"{path}\n{found}\n".encode())
    return digest.hexdigest()


def _digits(config: TrainConfig) -> Source:
    """scikit-learn's 1,797 scans of 8×8 pixels and 17 levels, as 8-bit grayscale images."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the digits need scikit-learn: pip install 'ddpm-hf[train]'.") from error
    if config.label_column not in (None, "label"):
        raise ValueError(f"`label_column` is {config.label_column!r}, but the digits only have `label`.")
    digits = load_digits()
    scans = [Image.fromarray((scan * (255 / 16)).round().astype(np.uint8)) for scan in digits.images]
    labels = digits.target.astype(np.int64) if config.label_column else None
    names = [str(n) for n in digits.target_names] if config.label_column else None
    return Source("scikit-learn digits", None, len(scans), lambda indices: [scans[i] for i in indices], labels, names)
