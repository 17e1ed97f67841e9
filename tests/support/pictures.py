"""Numbered images: a test recognizes each by its pixels, however it was stored."""

import itertools

from PIL import Image

N = 23
NAMES = ["cat", "dog"]


def picture(i):
    """A wide image whose pixels all tell that it is number i."""
    return Image.new("L", (12 + i % 5, 8), i)


KINDS = {
    "cached": {},
    "on the fly": {"cache_limit_gb": 0},
    "by workers": {"cache_limit_gb": 0, "dataloader_num_workers": 2},
    "streamed": {"streaming": True, "max_train_steps": 1, "shuffle_buffer_size": 10},
    "streamed by workers": {
        "streaming": True, "max_train_steps": 1, "shuffle_buffer_size": 10, "dataloader_num_workers": 2,
    },
}  # fmt: skip


def take(images, number, first=0, size=1, stride=None, seed=0):
    """Batches: which images they hold, by their pixels."""
    batches = itertools.islice(images.batches(first, size, stride or size, seed), number)
    return [batch.pixels[:, 0, 0, 0].tolist() for batch in batches]


def flat(batches):
    return list(itertools.chain.from_iterable(batches))
