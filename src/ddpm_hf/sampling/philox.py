"""Random numbers that any language can repeat: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") and the Box-Muller transform.

An image has a seed of 64 bits, and its noise is drawn in a fixed order: draw 0 is x_T, draw n the noise of step n.
Value e of draw n, in the order C, H, W, follows from (seed, n, e) alone:

    r_0 … r_3 = philox4x32_10(counter = (e div 4, n, 0, 0), key = (seed mod 2³², seed div 2³²))
    j = 2 ((e mod 4) div 2)
    ρ = sqrt(-2 ln((r_j + 1) / 2³²)),   φ = 2π r_{j+1} / 2³²
    value = ρ cos φ for even e, ρ sin φ for odd e, in float64, rounded to float32

The page of `ddpm-hf demo --static` has the same in JavaScript (demo/static/sampler.js).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = np.uint64(0xFFFFFFFF)
WORD = np.uint64(32)


class PhiloxGenerator(torch.Generator):
    """The noise of one image, for wherever `DDPMPipelineCustom` takes a `torch.Generator`.

    Args:
        seed: from 0 to 2⁶⁴ - 1.

    Raises:
        ValueError: for any other seed.
    """

    def __new__(cls, seed: int) -> PhiloxGenerator:
        """A generator: that of PyTorch takes no seed."""
        return super().__new__(cls)

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"`seed` is {seed}, but must lie between 0 and 2^64 - 1.")
        self.philox_seed, self._draws = seed, 0

    def draw_normal(self, shape: Sequence[int]) -> torch.Tensor:
        """The next draw, ~ N(0, 1), float32 of this shape, on the CPU."""
        values = philox_normal(self.philox_seed, self._draws, math.prod(shape))
        self._draws += 1
        return torch.from_numpy(values).reshape(*shape)


def philox_normal(seed: int, draw: int, count: int) -> np.ndarray:
    """The first values of a draw, ~ N(0, 1), float32 of shape (count,)."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    zeros = np.zeros_like(blocks)
    words = philox4x32((blocks, np.full_like(blocks, draw), zeros, zeros), (seed & 0xFFFFFFFF, seed >> 32))
    first, second = words[:, 0::2].astype(np.float64), words[:, 1::2].astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log((first + 1) / 2**32)), second * (2 * np.pi / 2**32)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1)[:count].astype(np.float32)


def philox4x32(counter: Sequence[np.ndarray], key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10.

    Args:
        counter: four arrays (N,) of uint64 that hold 32 bits.
        key: two words of 32 bits.

    Returns:
        uint32 of shape (N, 4).
    """
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    for i in range(ROUNDS):
        keys = [np.uint64((k + i * step) & 0xFFFFFFFF) for k, step in zip(key, KEY_INCREMENTS, strict=True)]
        a, b = (np.uint64(m) * word for m, word in zip(MULTIPLIERS, (c[0], c[2]), strict=True))
        c = [(b >> WORD) ^ c[1] ^ keys[0], b & LOW, (a >> WORD) ^ c[3] ^ keys[1], a & LOW]
    return np.stack(c, -1).astype(np.uint32)
