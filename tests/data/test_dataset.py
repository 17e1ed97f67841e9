"""Training images: the same from every kind of storage, in an order that is a function of progress."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data.dataset import StoredImages
from support.pictures import KINDS, N, flat, take
from support.runs import run, train_command


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


def test_batches_do_not_change_the_random_state_of_the_run(load):
    for kind in KINDS:
        images = load(kind)
        before = torch.get_rng_state()
        take(images, 3)
        images.sample(4, 0)
        assert torch.equal(torch.get_rng_state(), before)


def test_sixteen_bits_reach_the_network(load, tmp_path):
    (tmp_path / "deep").mkdir()
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) + 30000
    Image.fromarray(levels).save(tmp_path / "deep" / "0.png")
    for kind in ("cached", "on the fly", "streamed"):
        options = {"train_data_dir": str(tmp_path / "deep"), "label_column": None, "preserve_input_precision": True}
        pixels = next(load(kind, **options).batches(0, 3, 3, 0)).pixels
        assert pixels.dtype == torch.uint16
        np.testing.assert_array_equal(pixels.numpy(), np.broadcast_to(levels, (3, 1, 8, 8)))


def test_a_sample_is_the_start_of_the_stream(load):
    for kind in KINDS:
        images = load(kind)
        assert images.sample(5, 0)[:, 0, 0, 0].tolist() == take(images, 1, size=5)[0]
    assert len(load().sample(100, 0)) == N


def test_a_stream_has_no_length(load):
    images = load("streamed")
    assert not images.has_length
    with pytest.raises(TypeError, match="is a stream, of unknown length"):
        len(images)


def test_stored_images_are_a_tensor_in_memory():
    images = StoredImages(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), "numbers")
    assert sorted(take(images, 1, size=10)[0]) == list(range(10))
    assert images.num_classes is None


@pytest.mark.slow
def test_a_thread_reads_ahead_while_a_batch_is_used():
    main, threads, read_next = threading.current_thread(), [], threading.Event()

    class Watched(StoredImages):
        def _read(self, request):
            threads.append(threading.current_thread())
            if len(threads) == 2:
                read_next.set()
            return super()._read(request)

    images = Watched(torch.arange(100, dtype=torch.uint8).reshape(100, 1, 1, 1), "numbers")
    batches = images.batches(0, 4, 4, seed=0)
    first = next(batches)
    assert read_next.wait(timeout=60)
    assert main not in threads
    seen = torch.cat([first.pixels, *(next(batches).pixels for _ in range(24))])
    assert sorted(seen.flatten().tolist()) == list(range(100))


def test_a_run_trains_on_a_stream(tmp_path, damaged):
    options = ["--train_data_dir", str(damaged), "--resolution", "8", "--channels", "3", "--max_train_steps", "2"]
    options += ["--streaming", "--dataloader_num_workers", "1", "--on_bad_image", "skip"]
    done = run(train_command(tmp_path / "out", *options, "--cache_dir", str(tmp_path / "cache")))
    assert done.returncode == 0, done.stderr
    assert "a stream of images" in done.stdout
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"
    assert "Exception ignored" not in done.stderr
