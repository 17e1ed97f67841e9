"""One step of the paper's Algorithms 3 and 4 in real bits: the sender steers the receiver's noise.

The receiver draws x_s = μ_p + σ_p z. Instead of z from a random generator, it takes that of 2^C codewords which C bits
name; the sender picks that which makes x_s most like a draw from q(x_s | x_t, x_0) = N(μ_q, σ_q² I), by the ratio

    log q(x_s)/p(x_s) = const + Σ_i (z_i u_i / r - z_i² (1/r - 1) / 2),     u = (μ_q - μ_p)/σ_p,  r = σ_q²/σ_p².

With C = KL(q ‖ p) bits, some codeword is as typical of q as its own draws are. Codewords are Gaussian noise from a seed
that both sides have, so the bits depend on no floating-point number of the receiver: it may round differently.

The codebook is a trellis, of which 2^C codewords are searched in a time linear in C: the values are permuted, their
signs flipped at random, and divided into C segments; segment j is a row of a fixed table of 2^L rows, namely that of
the last L bits, b_{j-L+1} … b_j. The Viterbi algorithm finds the best path. Blocks of bits are circular (tail-biting),
so that each bit steers L segments. (Poisson functional representation, Li and El Gamal 2018, would search chunks of a
few bits among independent candidates, at a cost exponential in the chunk, and with bits for the spread of the index.)
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from ..sampling.philox import philox4x32, philox_normal

MEMORY = 12  # L, the bits that steer a segment: 14 gain one per cent of rate, and cost four times the time
ROWS = 2**MEMORY
WIDTH = 256  # columns of the table; a longer segment repeats them, with signs of its own
BLOCK = 256  # bits of a circular block, about
SEARCHED_WHOLE = 3 * MEMORY  # bits up to which blocks are of L bits
FEW = 0.75 * SEARCHED_WHOLE  # the divergence for which those are sent
BLOCKS_AT_ONCE = 16  # of which the metric takes 64 MB
CODEBOOK_DRAW = 2**32 - 1  # of philox_normal; the draws of noise count from 0


def bits_for(kl: float) -> int:
    """C, how many bits to send for a divergence of KL(q ‖ p) bits.

    Where they are many, as many: what the search falls short of, a few per cent, the next step makes up for. A few bits
    name the best of 2^C independent candidates, and need those of its order statistic: E max² ≈ ln 4^C - ln(4π ln 2^C).
    """
    if kl > FEW:
        return round(max(SEARCHED_WHOLE, kl + 4))
    chunks = max(1, math.ceil(kl / (0.75 * MEMORY)))
    return round(kl + chunks * max(0.0, 1.33 + 0.5 * math.log2(max(kl / chunks, 1e-9) * 2 * math.log(2))))


@dataclass(frozen=True)
class SharedRandomness:
    """All random numbers that sender and receiver share.

    Args:
        seed: from 0 to 2^64 - 1.
    """

    seed: int

    @property
    def codebook(self) -> np.ndarray:
        """The table of the trellis, ~ N(0, 1), float32 (ROWS, WIDTH)."""
        return _codebook(self.seed)

    @cached_property
    def norms(self) -> np.ndarray:
        """Σ z² over the first columns of each row, float32 (WIDTH + 1, ROWS)."""
        sums = np.cumsum(self.codebook.T.astype(np.float64) ** 2, axis=0)
        return np.concatenate([np.zeros((1, ROWS)), sums]).astype(np.float32)

    def noise(self, draw: int, count: int) -> np.ndarray:
        """Noise that no bits steer, ~ N(0, 1), float32 (count,)."""
        return philox_normal(self.seed, draw, count)

    def arrangement(self, draw: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """A random permutation of `count` values, int64, and random signs, float32 of ±1."""
        counter = np.arange(count, dtype=np.uint64)
        rest = np.full_like(counter, draw), np.ones_like(counter), np.zeros_like(counter)
        words = philox4x32((counter, *rest), (self.seed & 0xFFFFFFFF, self.seed >> 32))
        keys = words[:, 0].astype(np.uint64) << np.uint64(32) | words[:, 1]
        return np.argsort(keys, kind="stable"), np.where(words[:, 2] & 1, np.float32(1), np.float32(-1))


def steered_noise(shared: SharedRandomness, draw: int, bits: np.ndarray, count: int) -> np.ndarray:
    """The noise that bits name (the receiver's half).

    Args:
        draw: the number of the step.
        bits: (C,) of 0 and 1, with C ≤ count; with none, the noise is any.
        count: the values of the noise.

    Returns:
        float32 (count,).
    """
    if not len(bits):
        return shared.noise(draw, count)
    starts = _starts(count, len(bits))
    segment = np.repeat(np.arange(len(bits)), np.diff(starts))
    column = (np.arange(count) - starts[segment]) % WIDTH
    order, signs = shared.arrangement(draw, count)
    noise = np.empty(count, np.float32)
    noise[order] = shared.codebook[_states(bits)[segment], column] * signs
    return noise


def steer(shared: SharedRandomness, draw: int, shift: np.ndarray, ratio: float, num_bits: int) -> np.ndarray:
    """The bits whose noise makes x_s most like a draw from q (the sender's half).

    Args:
        draw: the number of the step.
        shift: u = (μ_q - μ_p)/σ_p, (D,).
        ratio: r = σ_q²/σ_p², in (0, 1].
        num_bits: C, from 0 to D.

    Returns:
        uint8 (C,) of 0 and 1.
    """
    if not num_bits:
        return np.zeros(0, np.uint8)
    count = len(shift)
    order, signs = shared.arrangement(draw, count)
    starts = _starts(count, num_bits)
    segments = _segments(shift.astype(np.float32)[order] * signs, starts) / np.float32(ratio)
    table = shared.codebook[:, : segments.shape[1]]
    if ratio < 1:  # the squares z² are columns, too, of which a segment has that of its length
        lengths = np.diff(starts)
        for length in np.unique(lengths):
            repeats, rest = divmod(int(length), WIDTH)
            squares = repeats * shared.norms[-1] + shared.norms[rest]
            table = np.column_stack([table, np.float32(0.5 - 0.5 / ratio) * squares])
            segments = np.column_stack([segments, (lengths == length).astype(np.float32)])
    bits = np.empty(num_bits, np.uint8)
    ends = _blocks(num_bits)
    sizes = np.diff(ends)
    for size in np.unique(sizes):
        first = ends[:-1][sizes == size]
        for i in range(0, len(first), BLOCKS_AT_ONCE):
            rows = (first[i : i + BLOCKS_AT_ONCE] + np.arange(size)[:, None]).ravel()
            metric = segments[rows] @ table.T
            bits[rows] = _best_path(metric.reshape(size, -1, ROWS)).ravel()
    return bits


@lru_cache(maxsize=1)
def _codebook(seed: int) -> np.ndarray:
    return philox_normal(seed, CODEBOOK_DRAW, ROWS * WIDTH).reshape(ROWS, WIDTH)


def _starts(count: int, num_bits: int) -> np.ndarray:
    """Where the segments start, (C + 1,)."""
    return np.arange(num_bits + 1) * count // num_bits


def _blocks(num_bits: int) -> np.ndarray:
    """Where the circular blocks start among the bits, (B + 1,)."""
    # Slightly more bits than L leave few paths that end where they started: chunks that are searched whole are better.
    blocks = -(-num_bits // MEMORY) if num_bits <= SEARCHED_WHOLE else max(1, round(num_bits / BLOCK))
    return _starts(num_bits, blocks)


def _segments(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The values of each segment in a row of at most WIDTH columns; those of a longer one are added up."""
    longest = int(np.diff(starts).max())
    width = min(longest, WIDTH)
    index = starts[:-1, None] + np.arange(-(-longest // width) * width)
    rows = np.where(index < starts[1:, None], values[np.minimum(index, len(values) - 1)], np.float32(0))
    return rows.reshape(len(rows), -1, width).sum(axis=1)


def _states(bits: np.ndarray) -> np.ndarray:
    """The row of the table of each segment: its bit and the L - 1 before it, around its block.

    Args:
        bits: (C,) or (C, *).

    Returns:
        int64, of the same shape.
    """
    states = np.zeros(bits.shape, np.int64)
    ends = _blocks(len(bits))
    for first, end in itertools.pairwise(ends):
        block = bits[first:end].astype(np.int64)
        for k in range(MEMORY):
            states[first:end] |= np.roll(block, k, axis=0) << k
    return states


def _best_path(metric: np.ndarray) -> np.ndarray:
    """The bits of the circular path of greatest metric, of each of B blocks.

    Args:
        metric: of each segment and row of the table, float32 (J, B, ROWS).

    Returns:
        uint8 (J, B).
    """
    J = len(metric)
    if J <= MEMORY:  # all 2^J of them
        bits = ((np.arange(2**J)[:, None] >> np.arange(J)) & 1).astype(np.uint8)
        states = _states(bits.T)
        sums = sum(metric[j][:, states[j]] for j in range(J))
        return bits[np.argmax(sums, axis=1)].T
    # Where the path starts, and must end, is read off one that went round with its ends elsewhere.
    half = J // 2
    around = _viterbi(metric, np.roll(np.arange(J), -half), None)
    return (_viterbi(metric, np.arange(J), around[J - 1 - half]) & 1).astype(np.uint8)


def _viterbi(metric: np.ndarray, positions: np.ndarray, ends: np.ndarray | None) -> np.ndarray:
    """The states of the best paths through the trellis, int64 (J, B).

    A state follows from two: s' = (2s + bit) mod 2^L, which are s'//2 and that plus 2^(L-1).

    Args:
        metric: (J, B, ROWS).
        positions: the order in which the segments are visited, (J,).
        ends: the state before the first and at the last segment, (B,); None leaves both free.
    """
    J, B = metric.shape[:2]
    half, block = ROWS // 2, np.arange(B)
    score = np.zeros((B, ROWS), np.float32)
    if ends is not None:
        score[:] = -np.inf
        score[block, ends] = 0
    from_upper = np.empty((J, B, half), bool)
    for j, position in enumerate(positions):
        lower, upper = score[:, :half], score[:, half:]
        np.greater(upper, lower, out=from_upper[j])
        best = np.maximum(lower, upper)
        np.add(best, metric[position, :, 0::2], out=score[:, 0::2])
        np.add(best, metric[position, :, 1::2], out=score[:, 1::2])
    state = score.argmax(axis=1) if ends is None else ends
    states = np.empty((J, B), np.int64)
    for j in range(J - 1, -1, -1):
        states[j] = state
        before = state // 2
        state = before + half * from_upper[j, block, before]
    return states
