"""Images that can't be read are named or skipped, and worker processes end when they should."""

import io
import itertools
import os
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.decoding import decode_batches, decode_rows
from ddpm_hf.data.sources import Source
from ddpm_hf.data.transform import Transform
from support.pictures import KINDS, N, flat, picture, take
from support.runs import run


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_damaged_image_ends_the_run_with_its_name(load, damaged, kind):
    with pytest.raises(ValueError, match=r"image \d+ .*(04|07)\.png.* can't be read .*--on_bad_image skip"):
        take(load(kind, train_data_dir=str(damaged)), N)


@pytest.mark.parametrize("kind", ["cached", "on the fly", "by workers"])
def test_damaged_images_are_skipped_and_listed(load, damaged, kind):
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


def test_workers_drop_a_request_that_is_not_wanted_any_more(tmp_path):
    """Each would take 20 seconds."""
    log = tmp_path / "log"

    def read(indices):
        for _ in indices:
            with log.open("a") as file:
                file.write("row\n")
            time.sleep(0.01 if len(indices) > 1 else 0)
            yield png_row

    stream = io.BytesIO()
    picture(0).save(stream, "PNG")
    png_row = {"bytes": stream.getvalue(), "path": None}
    decoder = partial(decode_rows, Source("slow", None, 10_000, read), Transform(8, "L"))
    batches = decode_batches(decoder, [range(1), range(2000), range(2000)], workers=2)
    next(batches)
    batches.close()
    assert len(log.read_text().splitlines()) < 2001


@pytest.mark.parametrize("size", [1, 4, N])
@pytest.mark.parametrize("kind", ["streamed", "streamed by workers"])
def test_in_a_stream_other_images_replace_damaged_ones(load, damaged, kind, size):
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


def test_a_killed_worker_is_an_error_with_a_remedy():
    with pytest.raises(RuntimeError, match="process that decodes images was killed.*--dataloader_num_workers"):
        next(decode_batches(os._exit, [0], workers=1))


@pytest.mark.slow
def test_workers_outlive_the_signals_that_the_run_survives_but_not_the_run(folder, tmp_path):
    """They end with a run that raises, and with its twin that is killed: otherwise their pipes would stay open."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, signal
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images

if __name__ == "__main__":
    options = {{"cache_dir": {str(tmp_path / "cache")!r}, "cache_limit_gb": 0, "dataloader_num_workers": 2}}
    images = load_images(TrainConfig(train_data_dir={str(folder)!r}, resolution=8, **options))
    twin = os.fork()
    batches = images.batches(0, 4, 4, 0)
    next(batches)
    if twin == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(twin, 0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # which the workers, started before, have not inherited
        os.killpg(0, number)
        for _ in range(10):
            next(batches)
    raise RuntimeError("the end")
""")
    done = run([sys.executable, str(script)], start_new_session=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: the end")
