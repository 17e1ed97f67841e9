"""The cache of decoded images: complete or absent, whatever interrupts the build."""

import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data import cache as image_cache
from ddpm_hf.data.cache import ImageCache
from ddpm_hf.data.dataset import DecodedImages, StoredImages, load_images
from ddpm_hf.data.sources import Source
from ddpm_hf.data.transform import Transform

N = 12
TRANSFORM = Transform(8, "L")
fork = multiprocessing.get_context("fork")


def png(i):
    stream = io.BytesIO()
    Image.new("L", (9, 8), i).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{i}.png"}


def source(log=None, bad=()):
    """PNGs number 0 … N - 1. Which ones are read is appended to the file `log`."""
    rows = [{"bytes": b"text", "path": f"{i}.png"} if i in bad else png(i) for i in range(N)]

    def read(indices):
        if log is not None:
            with log.open("a") as stream:
                stream.write("".join(f"{i}\n" for i in indices))
        return [rows[i] for i in indices]

    return Source("pictures", "some fingerprint", N, read)


def contents(cache):
    return cache.pixels(cache.load())[:, 0, 0, 0].tolist()


def pixel_file(cache):
    (file,) = cache.folder.glob("pixels*")
    return file


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Two images a request, and a record after every second request, whatever the clock says."""
    monkeypatch.setattr(image_cache, "REQUEST", 2 * 64)
    monkeypatch.setattr(image_cache, "record_due", lambda: itertools.cycle([False, True]))


def killed_while_building(cache, at):
    """Build in a process that kills itself at its `at`-th attempt to write to the disk; returns its exit code."""

    def build():
        calls = iter(range(1, at))

        def or_die(function):
            def call(*arguments, **options):
                if next(calls, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        os.fsync = or_die(os.fsync)
        image_cache.Path.replace = or_die(image_cache.Path.replace)
        image_cache.Path.unlink = or_die(image_cache.Path.unlink)
        cache.build(skip_unreadable=True, show_progress=False)

    process = fork.Process(target=build)
    process.start()
    process.join()
    return process.exitcode


def test_a_build_killed_at_any_moment_leaves_no_false_cache_and_resumes(tmp_path):
    at, numbers_of_reads = 0, []
    exit_code = -signal.SIGKILL
    while exit_code == -signal.SIGKILL:
        at += 1
        root = tmp_path / str(at)
        root.mkdir()
        cache = ImageCache(root, source(bad=[3]), TRANSFORM)
        exit_code = killed_while_building(cache, at)
        is_whole = cache.load() is not None
        log = root / "log"
        again = ImageCache(root, source(log, bad=[3]), TRANSFORM)
        survey = again.build(skip_unreadable=True, show_progress=False)
        assert contents(again) == [i for i in range(N) if i != 3]
        assert [bad.index for bad in survey.unreadable] == [3]
        reads = log.read_text().split() if log.exists() else []
        assert not (is_whole and reads)
        numbers_of_reads.append(len(reads))
    assert exit_code == 0
    assert numbers_of_reads[0] == N  # nothing was safe yet
    assert numbers_of_reads == sorted(numbers_of_reads, reverse=True)  # later and later, less and less is done again
    assert len(set(numbers_of_reads)) == N // 4 + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_build_that_is_interrupted_between_two_records_loses_nothing(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(image_cache, "record_due", lambda: itertools.repeat(False))
    monkeypatch.setattr(image_cache, "_workers", lambda images: workers)

    def interrupted(indices):
        if 8 in indices:
            raise KeyboardInterrupt
        return source().read(indices)

    with pytest.raises(KeyboardInterrupt):
        ImageCache(tmp_path, replace(source(), read=interrupted), TRANSFORM).build(False, show_progress=False)
    log = tmp_path / "log"
    cache = ImageCache(tmp_path, source(log), TRANSFORM)
    cache.build(skip_unreadable=False, show_progress=False)
    assert sorted(map(int, log.read_text().split())) == list(range(8, N))
    assert contents(cache) == list(range(N))


@pytest.mark.parametrize(("seconds", "due"), [(0, True), (math.inf, False)])
def test_a_record_is_due_by_time(monkeypatch, seconds, due):
    monkeypatch.undo()
    monkeypatch.setattr(image_cache, "RECORD_SECONDS", seconds)
    assert list(itertools.islice(image_cache.record_due(), 3)) == [due] * 3


@pytest.mark.parametrize("record", ["{", "{}", "[]", '{"unreadable": [{}]}', '{"unreadable": [], "tried": "12"}'])
def test_a_damaged_record_is_no_cache(tmp_path, record):
    cache = ImageCache(tmp_path, source(), TRANSFORM)
    cache.build(skip_unreadable=False, show_progress=False)
    (cache.folder / "cache.json").write_text(record)
    assert cache.load() is None
    cache.build(skip_unreadable=False, show_progress=False)
    assert contents(cache) == list(range(N))


def test_of_two_processes_one_builds(tmp_path):
    log = tmp_path / "log"
    gate = fork.Barrier(2)

    def build():
        gate.wait()
        ImageCache(tmp_path / "cache", source(log), TRANSFORM).build(skip_unreadable=False, show_progress=False)

    processes = [fork.Process(target=build) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert log.read_text().split() == [str(i) for i in range(N)]
    assert contents(ImageCache(tmp_path / "cache", source(), TRANSFORM)) == list(range(N))


@pytest.mark.parametrize("first_dies", [False, True])
def test_two_machines_whose_locks_do_not_reach_each_other_build_one_cache(tmp_path, monkeypatch, first_dies):
    """The first has recorded eight images, and written two more, when the second begins; then it finishes or dies."""
    transform = Transform(64, "L")
    monkeypatch.setattr(image_cache, "REQUEST", 2 * 64 * 64)
    monkeypatch.setattr(image_cache, "record_due", lambda: itertools.cycle([False, False, False, True]))

    class LockOfAMachine(FileLock):
        def __init__(self, path):
            super().__init__(f"{path}-{os.getpid()}")

    monkeypatch.setattr(image_cache, "FileLock", LockOfAMachine)
    begun, finish, finished = fork.Event(), fork.Event(), fork.Event()
    log = tmp_path / "log"

    def slow(indices):
        if N - 1 in indices:
            begun.set()
            finish.wait()
            if first_dies:
                os._exit(1)
        return source().read(indices)

    def first():
        cache = ImageCache(tmp_path, replace(source(), read=slow), transform)
        survey = cache.build(skip_unreadable=True, show_progress=False)
        assert cache.pixels(survey)[:, 0, 0, 0].tolist() == list(range(N))
        finished.set()

    def second():
        def read(indices):
            finish.set()
            assert first_dies or finished.wait(60)
            return source(log).read(indices)

        cache = ImageCache(tmp_path, replace(source(), read=read), transform)
        survey = cache.build(skip_unreadable=True, show_progress=False)
        assert cache.pixels(survey)[:, 0, 0, 0].tolist() == list(range(N))

    processes = [fork.Process(target=first), fork.Process(target=second)]
    processes[0].start()
    begun.wait()
    processes[1].start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [int(first_dies), 0]
    assert log.read_text().split() == [str(i) for i in range(8, N)]  # the others were copied
    cache = ImageCache(tmp_path, source(), transform)
    assert contents(cache) == list(range(N))
    assert len(list(cache.folder.glob("p*"))) == 1  # nothing is left of the builds


def test_a_truncated_cache_is_rebuilt(tmp_path):
    cache = ImageCache(tmp_path, source(), TRANSFORM)
    cache.build(skip_unreadable=False, show_progress=False)
    for damage in (lambda: os.truncate(pixel_file(cache), 100), lambda: (cache.folder / "cache.json").write_text("{")):
        damage()
        assert cache.load() is None
        cache.build(skip_unreadable=False, show_progress=False)
        assert contents(cache) == list(range(N))


def test_workers_build_the_same_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "_workers", lambda images: 2)
    cache = ImageCache(tmp_path, source(bad=[5]), TRANSFORM)
    cache.build(skip_unreadable=True, show_progress=False)
    assert contents(cache) == [i for i in range(N) if i != 5]


def test_writing_to_the_pixels_does_not_change_the_cache(tmp_path):
    cache = ImageCache(tmp_path, source(), TRANSFORM)
    cache.pixels(cache.build(skip_unreadable=False, show_progress=False))[:] = 0
    assert contents(cache) == list(range(N))


def test_every_part_of_the_transform_has_a_cache_of_its_own(tmp_path):
    others = [
        Transform(16, "L"), Transform(8, "LA"), Transform(8, "L", "lanczos"), Transform(8, "L", crop_seed=0),
        Transform(8, "L", crop_seed=1), Transform(8, "L", keep_16_bits=True), Transform(8, "L", version=2),
    ]  # fmt: skip
    folders = {ImageCache(tmp_path, source(), transform).folder for transform in [TRANSFORM, *others]}
    assert len(folders) == 8


def test_on_a_full_disk_the_error_names_a_remedy_and_the_build_resumes(tmp_path, monkeypatch):
    cache = ImageCache(tmp_path, source(), TRANSFORM)
    fsync, calls = os.fsync, iter(range(4))

    def full(file):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*--cache_dir.*--cache_limit_gb 0"):
        cache.build(skip_unreadable=False, show_progress=False)
    monkeypatch.setattr(os, "fsync", fsync)
    log = tmp_path / "log"
    ImageCache(tmp_path, source(log), TRANSFORM).build(skip_unreadable=False, show_progress=False)
    assert log.read_text().split() == [str(i) for i in range(8, N)]
    assert contents(cache) == list(range(N))


# --- what load_images makes of it ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(N):
        Image.new("L", (8, 8), i).save(tmp_path / "pictures" / f"{i:02}.png")
    return tmp_path / "pictures"


def load(folder, **options):
    config = TrainConfig(
        train_data_dir=str(folder), cache_dir=str(folder.parent / "cache"), resolution=8, channels=1, **options
    )
    return load_images(config, show_progress=False)


def records(folder):
    return sorted((folder.parent / "cache" / "decoded_images").glob("*/cache.json"))


def test_a_second_start_decodes_nothing_and_changed_files_are_decoded_again(folder):
    assert load(folder).pixels[:, 0, 0, 0].tolist() == list(range(N))
    before = [(r, r.stat().st_mtime_ns) for r in records(folder)]
    load(folder)
    assert [(r, r.stat().st_mtime_ns) for r in records(folder)] == before

    times = (folder / "03.png").stat()
    Image.new("L", (16, 8), 200).save(folder / "03.png")
    os.utime(folder / "03.png", ns=(times.st_atime_ns, times.st_mtime_ns))  # only the size tells
    assert load(folder).pixels[3, 0, 0, 0] == 200
    Image.new("L", (16, 8), 201).save(folder / "03.png")
    assert load(folder).pixels[3, 0, 0, 0] == 201
    (folder / "03.png").rename(folder / "99.png")
    assert load(folder).pixels[-1, 0, 0, 0] == 201


def test_square_images_have_one_cache_for_all_seeds_and_crops(folder):
    assert torch.equal(load(folder, seed=1).pixels, load(folder, seed=2).pixels)
    (record,) = records(folder)
    written = record.stat().st_mtime_ns
    load(folder, center_crop=True)
    assert [(r, r.stat().st_mtime_ns) for r in records(folder)] == [(record, written)]

    Image.effect_noise((16, 8), 60).save(folder / "11.png")  # a single one of which a part is seen
    one, two, same = (load(folder, seed=seed).pixels for seed in (1, 2, 1))
    assert not torch.equal(one[11], two[11])
    assert torch.equal(one, same)
    assert len(records(folder)) == 3


def test_on_the_fly_all_seeds_have_one_list_of_damaged_images(folder):
    (folder / "05.png").write_text("text")
    for seed in (1, 2):
        assert len(load(folder, seed=seed, cache_limit_gb=0, on_bad_image="skip")) == N - 1
    assert len(records(folder)) == 1


def test_beyond_the_limit_images_are_decoded_on_the_fly(folder, monkeypatch):
    in_gb = N * 64 / 1e9
    assert isinstance(load(folder, cache_limit_gb=in_gb * 0.99), DecodedImages)
    assert records(folder) == []
    assert isinstance(load(folder, cache_limit_gb=in_gb), StoredImages)
    assert isinstance(load(folder, cache_limit_gb=0), DecodedImages)


@pytest.mark.parametrize("present", [0, 200, N * 64])
def test_without_a_limit_half_of_the_free_disk_may_be_used(folder, tmp_path, monkeypatch, present):
    """What an interrupted build has written counts as free space; otherwise it could never be resumed."""
    needed = N * 64
    for free, kind in ((2 * needed - present, StoredImages), (2 * needed - present - 2, DecodedImages)):
        cache = ImageCache(tmp_path / str(free) / "decoded_images", source(), TRANSFORM)
        cache.folder.mkdir(parents=True)
        (cache.folder / "pixels.bin").write_bytes(bytes(present))
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr("ddpm_hf.storage.files.shutil.disk_usage", lambda path, usage=usage: usage)
        monkeypatch.setattr("ddpm_hf.data.dataset.open_source", lambda config: source())
        config = TrainConfig(
            train_data_dir=str(folder), cache_dir=str(tmp_path / str(free)), resolution=8, channels=1, center_crop=True
        )
        assert isinstance(load_images(config, show_progress=False), kind)


def test_the_list_of_damaged_images_is_stored_with_the_cache(folder):
    (folder / "05.png").write_text("text")
    load(folder, on_bad_image="skip")
    (record,) = records(folder)
    (bad,) = json.loads(record.read_text())["unreadable"]
    assert (bad["index"], bad["path"]) == (5, str(folder / "05.png"))
    assert np.fromfile(record.parent / json.loads(record.read_text())["pixels"], np.uint8)[::64].tolist() == [
        i for i in range(N) if i != 5
    ]
