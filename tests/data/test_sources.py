"""Every source gives the same images and labels, and what holds neither is refused in one line."""

import cProfile
import pstats

import datasets
import numpy as np
import pytest
import torch

from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.sources import image_folder
from support.pictures import NAMES, N, picture


@pytest.mark.parametrize("kind", ["cached", "streamed"])
@pytest.mark.parametrize(
    "source", ["folder", "hub layout", "glob", "plain parquet", "arrow", "saved", "saved_dict", "webdataset"]
)
def test_every_source_gives_the_same_images_and_labels(load, kind, source):
    if kind == "streamed" and source in ("plain parquet", "webdataset"):
        with pytest.raises(ValueError, match=r"label_column.*ClassLabel.*--streaming"):
            load(kind, source)
        images = load(kind, source, label_column=None)
        assert images.num_classes is None
    else:
        images = load(kind, source)
        assert images.num_classes == 2
        assert images.label_names == (NAMES if source not in ("plain parquet", "webdataset") else ["0", "1"])
    batch = next(images.batches(0, N, N, seed=0))
    numbers = batch.pixels[:, 0, 0, 0].long()
    assert numbers.sort().values.tolist() == list(range(N))
    assert (batch.pixels == batch.pixels[:, :1, :1, :1]).all()
    if images.num_classes:
        assert batch.labels.dtype == torch.int64
        assert torch.equal(batch.labels, numbers % 2)
    else:
        assert batch.labels is None


@pytest.mark.parametrize(
    ("values", "labels", "names"),
    [([30, 10, 30], [1, 0, 1], ["10", "30"]), (["b", "a", "b"], [1, 0, 1], ["a", "b"])],
)
def test_integers_and_text_become_labels(tmp_path, values, labels, names):
    rows = {"image": [picture(i) for i in range(3)], "kind": values}
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.Value("string" if "a" in values else "int64")}
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    options = {"dataset_name": str(tmp_path / "t.parquet"), "cache_dir": str(tmp_path / "c"), "resolution": 8}
    images = load_images(TrainConfig(**options, label_column="kind"), show_progress=False)
    assert images.labels.tolist() == labels
    assert images.label_names == names


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("kind", ["a", None, "b"], "1 rows have no label, first row 1"),
        ("kind", [0.5, 1.5, 2.5], "float64.*ClassLabel, integers or text"),
        ("sort", ["a", "b", "a"], r"'sort', but the columns are \['image', 'kind'\]"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_give_no_labels_are_refused(tmp_path, column, values, message, streaming):
    rows = {"image": [picture(i) for i in range(3)], "kind": values}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    options = {"dataset_name": str(tmp_path / "t.parquet"), "cache_dir": str(tmp_path / "c"), "max_train_steps": 1}
    with pytest.raises(ValueError, match=message if not streaming or column == "sort" else "ClassLabel.*--streaming"):
        load_images(TrainConfig(**options, label_column=column, streaming=streaming), show_progress=False)


def test_the_digits_are_scikit_learns():
    config = parse_train_config(["--label_column", "label"])
    images = load_images(config, show_progress=False)
    assert images.pixels.shape == (1797, 1, 16, 16)
    from sklearn.datasets import load_digits

    pooled = torch.nn.functional.avg_pool2d(images.pixels[:, 0].double(), 2)
    correlation = np.corrcoef(pooled.flatten(), load_digits().images.ravel())[0, 1]
    assert correlation > 0.98  # 8×8 scans, only enlarged
    assert images.labels.tolist() == load_digits().target.tolist()
    assert images.label_names == [str(n) for n in range(10)]


def test_a_folder_of_twice_as_many_files_takes_twice_the_work(tmp_path):
    """Calls of functions are counted: the time would depend on the machine."""
    calls = []
    for count in (300, 600):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i}.png").touch()
        image_folder(folder, None, [])  # imports what is needed
        profile = cProfile.Profile()
        profile.runcall(image_folder, folder, None, [])
        calls.append(pstats.Stats(profile).total_calls)
    assert calls[1] < 2.1 * calls[0], calls


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_that_hold_no_images_are_refused_in_one_line(tmp_path, streaming):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no parquet")
    for options, message in [
        ({"train_data_dir": str(tmp_path / "none")}, "train_data_dir.*no such folder"),
        ({"train_data_dir": str(tmp_path / "empty")}, "no images"),
        ({"dataset_name": "nobody/nothing"}, "no images can be read from 'nobody/nothing'.*Hub"),
        ({"dataset_name": str(tmp_path / "*.tar")}, "no images"),
        ({"dataset_name": str(tmp_path / "text.parquet")}, "no images"),
    ]:
        config = TrainConfig(**options, cache_dir=str(tmp_path / "cache"), streaming=streaming, max_train_steps=1)
        with pytest.raises(ValueError, match=message) as raised:
            load_images(config, show_progress=False)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["cached", "streamed"])
def test_columns_that_hold_no_images_are_refused(load, kind):
    for column, message in (("label", "image_column.*'label'.*ClassLabel.*not images"), ("x", r"'x'.*\['picture'\]")):
        with pytest.raises(ValueError, match=message):
            load(kind, "saved", image_column=column)
