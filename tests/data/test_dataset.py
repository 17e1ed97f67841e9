"""Training images from every source: the same pixels and labels, in an order that is a function of progress."""

import io
import itertools
import shutil
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import StoredImages, load_images
from ddpm_hf.data.pixels import normalize, random_flip, to_uint8
from support.runs import run, train_command

N = 23
NAMES = ["cat", "dog"]


def picture(i):
    """A wide image whose pixels all tell that it is number i."""
    return Image.new("L", (12 + i % 5, 8), i)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images number 0 … N - 1, the even ones in `cat`, the odd ones in `dog`, and a file that is no image."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(N):
        (root / NAMES[i % 2]).mkdir(exist_ok=True)
        picture(i).save(root / NAMES[i % 2] / f"{i:02}.png")
    (root / "cat" / "readme.txt").write_text("cats")
    return root


@pytest.fixture(scope="module")
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


KINDS = {
    "cached": {},
    "on the fly": {"cache_limit_gb": 0},
    "by workers": {"cache_limit_gb": 0, "dataloader_num_workers": 2},
    "streamed": {"streaming": True, "max_train_steps": 1, "shuffle_buffer_size": 10},
    "streamed by workers": {
        "streaming": True, "max_train_steps": 1, "shuffle_buffer_size": 10, "dataloader_num_workers": 2,
    },
}  # fmt: skip


@pytest.fixture
def load(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.01)  # 5 s, else, per epoch of parquet

    def load(kind="cached", source="folder", **options):
        given = {"resolution": 8, "channels": 1, "cache_dir": str(tmp_path / "cache"), **sources[source]}
        return load_images(TrainConfig(**{**given, **KINDS[kind], **options}), show_progress=False)

    return load


def take(images, number, first=0, size=1, stride=None, seed=0):
    """Batches: which images they hold, by their pixels."""
    batches = itertools.islice(images.batches(first, size, stride or size, seed), number)
    return [batch.pixels[:, 0, 0, 0].tolist() for batch in batches]


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_shows_each_image_once_per_epoch_in_new_orders(load, kind):
    images = load(kind)
    endless = flat(take(images, 3 * N))
    epochs = [endless[e * N : (e + 1) * N] for e in range(3)]
    assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert take(images, 1, size=N, seed=1) != [epochs[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_from_any_position_the_stream_is_the_same(load, kind):
    images = load(kind)
    endless = flat(take(images, 4 * N))
    for first in (0, 1, N - 1, N, N + 5, 2 * N + 3):
        assert take(images, 1, first, size=N + 4) == [endless[first : first + N + 4]]  # across an epoch's end
        assert flat(take(load(kind), 4, first, size=3)) == endless[first : first + 12]


def test_a_stream_of_several_files_is_the_same_each_time(load):
    endless = flat(take(load("streamed", "glob"), 3 * N))
    for first in (0, 7, 2 * N - 1):
        assert take(load("streamed", "glob"), 1, first, size=N) == [endless[first : first + N]]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_share_what_one_would_see(load, kind):
    images = load(kind)
    alone = flat(take(images, 12, size=4))
    shares = [take(images, 6, first=4 * rank, size=4, stride=8) for rank in range(2)]
    assert flat(a + b for a, b in zip(*shares, strict=True)) == alone


def test_cached_and_decoded_and_streamed_images_are_equal_bit_for_bit(load, sources):
    for options in ({"center_crop": True}, {"seed": 3}, {"resize": "lanczos", "preserve_input_precision": True}):
        cached = [b for b, _ in zip(load(**options).batches(5, 7, 7, 0), range(9), strict=False)]
        for kind in ("on the fly", "by workers"):
            for ours, batch in zip(cached, load(kind, **options).batches(5, 7, 7, 0), strict=False):
                assert torch.equal(ours.pixels, batch.pixels)
                assert torch.equal(ours.labels, batch.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_random_crops_are_the_same_in_every_epoch(load, tmp_path, kind):
    (tmp_path / "wide").mkdir()
    for i in range(6):
        Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) + 40 * i, (8, 1))).save(tmp_path / "wide" / f"{i}.png")
    images = load(kind, train_data_dir=str(tmp_path / "wide"), label_column=None)
    epochs = np.reshape(flat(take(images, 4, size=6)), (4, 6))
    assert (np.sort(epochs) == np.sort(epochs[0])).all()
    assert len(set(epochs[0] % 40)) > 2


def test_batches_leave_the_random_numbers_of_the_run_alone(load):
    for kind in KINDS:
        images = load(kind)
        before = torch.get_rng_state()
        take(images, 3)
        images.sample(4, 0)
        assert torch.equal(torch.get_rng_state(), before)


# --- sources and labels ----------------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_workers_outlive_the_signals_that_the_run_survives_but_not_the_run(folder, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal, sys
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    options = {{"cache_dir": {str(tmp_path / "cache")!r}, "cache_limit_gb": 0, "dataloader_num_workers": 2}}
    images = load_images(TrainConfig(train_data_dir={str(folder)!r}, resolution=8, **options))
    batches = images.batches(0, 4, 4, 0)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(0, number)
        for _ in range(10):
            next(batches)
    raise RuntimeError("the end")
""")
    done = run([sys.executable, str(script)], start_new_session=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: the end")


# --- images that can't be read ---------------------------------------------------------------------------------------


@pytest.fixture
def damaged(folder, tmp_path):
    """The folder, with images 4 and 7 damaged."""
    root = tmp_path / "damaged"
    shutil.copytree(folder, root)
    (root / "cat" / "04.png").write_bytes((root / "cat" / "04.png").read_bytes()[:50])
    (root / "dog" / "07.png").write_text("text")
    return root


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_damaged_image_ends_the_run_with_its_name(load, damaged, kind):
    with pytest.raises(ValueError, match=r"image \d+ .*(04|07)\.png.* can't be read .*--on_bad_image skip"):
        take(load(kind, train_data_dir=str(damaged)), N)


@pytest.mark.parametrize("kind", ["cached", "on the fly", "by workers"])
def test_damaged_images_are_left_out_and_listed(load, damaged, kind):
    images = load(kind, train_data_dir=str(damaged), on_bad_image="skip")
    assert len(images) == N - 2
    assert sorted(Path(bad.path).name for bad in images.skipped) == ["04.png", "07.png"]
    whole = sorted(set(range(N)) - {4, 7})
    batch = next(images.batches(0, N - 2, 1, 0))
    numbers = batch.pixels[:, 0, 0, 0].long()
    assert sorted(numbers.tolist()) == whole
    assert torch.equal(batch.labels, numbers % 2)
    with pytest.raises(ValueError, match="can't be read"):  # also where a cache without them is there
        take(load(kind, train_data_dir=str(damaged)), N)


@pytest.mark.parametrize("size", [1, 4, N])
@pytest.mark.parametrize("kind", ["streamed", "streamed by workers"])
def test_in_a_stream_others_take_the_place_of_damaged_images(load, damaged, kind, size):
    images = load(kind, train_data_dir=str(damaged), on_bad_image="skip")
    for batch in itertools.islice(images.batches(0, size, size, 0), 2 * N // size):
        assert torch.equal(batch.labels, batch.pixels[:, 0, 0, 0] % 2)
    batches = take(images, 2 * N // size, size=size)
    seen = flat(batches)
    assert set(seen) == set(range(N)) - {4, 7}
    assert all(len(batch) == size for batch in batches)
    assert {Path(bad.path).name for bad in images.skipped} == {"04.png", "07.png"}
    assert len(images.skipped) == 2
    assert take(images, 1, first=3 * size, size=size) == batches[3:4] or size == N


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_without_any_readable_image_is_refused(load, tmp_path, kind):
    (tmp_path / "bad" / "cat").mkdir(parents=True)
    for i in range(12):
        (tmp_path / "bad" / "cat" / f"{i}.png").write_text("text")
    with pytest.raises(ValueError, match="can't be read|can be read"):
        take(load(kind, train_data_dir=str(tmp_path / "bad"), label_column=None, on_bad_image="skip"), 1)


def test_rows_without_an_image_are_damaged(tmp_path):
    rows = {"image": [picture(1), None, picture(2)]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()}))
    dataset.to_parquet(tmp_path / "t.parquet")
    options = {"dataset_name": str(tmp_path / "t.parquet"), "cache_dir": str(tmp_path / "c"), "resolution": 8}
    with pytest.raises(ValueError, match="image 1 .* holds no image"):
        load_images(TrainConfig(**options), show_progress=False)
    images = load_images(TrainConfig(**options, on_bad_image="skip"), show_progress=False)
    assert images.pixels[:, 0, 0, 0].tolist() == [1, 2]
    assert [bad.index for bad in images.skipped] == [1]


# --- what becomes of the pixels --------------------------------------------------------------------------------------


def test_pixels_map_to_plus_minus_one_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = normalize(pixels)
    assert (x[0], x[255]) == (-1, 1)
    assert torch.equal(to_uint8(x), pixels)
    deep = torch.from_numpy(np.arange(65536, dtype=np.uint16))
    y = normalize(deep)
    assert (y[0], y[65535]) == (-1, 1)
    assert len(y.unique()) == 65536
    torch.testing.assert_close(y[::257], x, rtol=0, atol=1e-6)


def test_sixteen_bits_reach_the_network(load, tmp_path):
    (tmp_path / "deep").mkdir()
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) + 30000
    Image.fromarray(levels).save(tmp_path / "deep" / "0.png")
    for kind in ("cached", "on the fly", "streamed"):
        options = {"train_data_dir": str(tmp_path / "deep"), "label_column": None, "preserve_input_precision": True}
        pixels = next(load(kind, **options).batches(0, 3, 3, 0)).pixels
        assert pixels.dtype == torch.uint16
        np.testing.assert_array_equal(pixels.numpy(), np.broadcast_to(levels, (3, 1, 8, 8)))


def test_flips_are_mirror_images_of_half_the_batch():
    x = torch.arange(64 * 4.0).reshape(64, 1, 2, 2)
    flipped = random_flip(x)
    is_flipped = (flipped == x.flip(-1)).flatten(1).all(1)
    is_plain = (flipped == x).flatten(1).all(1)
    assert (is_flipped ^ is_plain).all()
    assert 16 < int(is_flipped.sum()) < 48
    torch.manual_seed(0)  # as conftest does before each test
    assert torch.equal(random_flip(x), flipped)


def test_a_sample_is_the_start_of_the_stream(load):
    for kind in KINDS:
        images = load(kind)
        assert images.sample(5, 0)[:, 0, 0, 0].tolist() == take(images, 1, size=5)[0]
    assert len(load().sample(100, 0)) == N


def test_a_stream_has_no_length(load):
    images = load("streamed")
    assert not images.has_length
    with pytest.raises(TypeError, match="not known"):
        len(images)


def test_stored_images_are_a_tensor_in_memory():
    images = StoredImages(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), "numbers")
    assert sorted(take(images, 1, size=10)[0]) == list(range(10))
    assert images.num_classes is None


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_trains_on_a_stream(tmp_path, damaged):
    options = ["--train_data_dir", str(damaged), "--resolution", "8", "--channels", "3", "--max_train_steps", "2"]
    options += ["--streaming", "--dataloader_num_workers", "1", "--on_bad_image", "skip"]
    done = run(train_command(tmp_path / "out", *options, "--cache_dir", str(tmp_path / "cache")))
    assert done.returncode == 0, done.stderr
    assert "a stream of images" in done.stdout
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"
    assert "Exception ignored" not in done.stderr
