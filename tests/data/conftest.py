"""The same images in every container, and `load` to read them."""

import io
import shutil
import tarfile

import datasets
import pyarrow.parquet
import pytest

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from support.pictures import KINDS, NAMES, N, picture


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Images number 0 … N - 1, the even ones in `cat`, the odd ones in `dog`, and a file that is not an image."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(N):
        (root / NAMES[i % 2]).mkdir(exist_ok=True)
        picture(i).save(root / NAMES[i % 2] / f"{i:02}.png")
    (root / "cat" / "readme.txt").write_text("cats")
    return root


@pytest.fixture(scope="session")
def sources(folder, tmp_path_factory):
    """The same images in every container, as options of a configuration."""
    root = tmp_path_factory.mktemp("sources")
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"picture": [picture(i) for i in range(N)], "label": [i % 2 for i in range(N)]}
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(root / "saved")
    datasets.DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(root / "saved_dict")
    (root / "hub").mkdir()
    for k, part in enumerate((range(10), range(10, N))):
        dataset.select(part).to_parquet(root / "hub" / f"train-{k}.parquet")
    encoded = dataset.cast_column("picture", datasets.Image(decode=False))["picture"][:]
    pyarrow.parquet.write_table(pyarrow.table({**rows, "picture": encoded}), root / "plain.parquet")
    with tarfile.open(root / "shard-0.tar", "w") as tar:
        for i in range(N):
            for ending, data in (("png", encoded[i]["bytes"]), ("cls", str(i % 2).encode())):
                member = tarfile.TarInfo(f"{i:02}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    shutil.copy(next((root / "saved").glob("*.arrow")), root / "rows.arrow")
    return {
        "folder": {"train_data_dir": str(folder), "label_column": "label"},
        "hub layout": {"dataset_name": str(root / "hub"), "label_column": "label"},
        "glob": {"dataset_name": str(root / "hub" / "*.parquet"), "label_column": "label"},
        "plain parquet": {
            "dataset_name": str(root / "plain.parquet"), "image_column": "picture", "label_column": "label",
        },
        "arrow": {"dataset_name": str(root / "rows.arrow"), "label_column": "label"},
        "saved": {"dataset_name": str(root / "saved"), "label_column": "label"},
        "saved_dict": {"dataset_name": str(root / "saved_dict"), "label_column": "label"},
        "webdataset": {"dataset_name": str(root / "shard-*.tar"), "label_column": "cls"},
    }  # fmt: skip


@pytest.fixture
def load(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01, raising=False
    )  # 5 s, else, per epoch of parquet

    def load(kind="cached", source="folder", **options):
        given = {"resolution": 8, "channels": 1, "cache_dir": str(tmp_path / "cache"), **sources[source]}
        return load_images(TrainConfig(**{**given, **KINDS[kind], **options}), show_progress=False)

    return load


@pytest.fixture
def damaged(folder, tmp_path):
    """The folder, with images 4 and 7 damaged."""
    root = tmp_path / "damaged"
    shutil.copytree(folder, root)
    (root / "cat" / "04.png").write_bytes((root / "cat" / "04.png").read_bytes()[:50])
    (root / "dog" / "07.png").write_text("text")
    return root
