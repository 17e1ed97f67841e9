"""The bits: a stack of an entropy coder, from which symbols of Gaussians are popped, and onto which they are pushed.

Popping under a distribution draws from it and shortens the stack by as many bits as pushing under it takes: one is the
exact inverse of the other. The coder is that of the package constriction, with probabilities in units of 2^-24.
"""

from __future__ import annotations

import hashlib
import math
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .levels import FRACTION, Level, real

GRID = 4  # binary digits behind the point of a mean
WINDOW = 8.0  # standard deviations to each side, to which q is cut
MAX_LEVEL = 255  # of a pixel
SQRT_2_PI_E = math.sqrt(2 * math.pi * math.e)
Integers = NDArray[np.integer[Any]]


class StackTooShortError(ValueError):
    """There are fewer bits on the stack than the symbols to be popped may take."""


def coder_module() -> Any:
    """The package constriction: its stack coder and its models.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        from constriction import stream
    except ImportError as error:
        raise ValueError(
            "compression needs the package constriction, which is not installed: pip install 'ddpm-hf[codec]'."
        ) from error
    return stream


def describe_coder() -> dict[str, str]:
    """The version of the coder, and a hash of symbols that it pops under many Gaussians, since releases may differ."""
    key = np.frombuffer(hashlib.shake_128(b"coder").digest(16_384), "<u4")
    gaussian = coder_module().model.QuantizedGaussian(-2000, 2000)
    means, stds = np.linspace(-1000, 1000, 1001), np.ldexp(1 / 16, np.arange(1001) % 14)
    symbols = coder_module().stack.AnsCoder(key.astype(np.uint32)).decode(gaussian, means, stds)
    return {
        "constriction": version("constriction"),
        "probe": hashlib.sha256(symbols.astype("<i8").tobytes()).hexdigest()[:16],
    }


def check_coder(stored: Any) -> None:
    """Raise a ValueError unless this coder's numbers are those of a file, which has what `describe_coder` returned."""
    here = describe_coder()
    of_file = stored if isinstance(stored, dict) else {}
    if of_file.get("probe") != here["probe"]:
        raise ValueError(
            f"the coder's numbers here, of constriction {here['constriction']}, are not those of the file, of "
            f"constriction {of_file.get('constriction')}: install that version."
        )


class BitStack:
    """A stack of bits.

    Args:
        words: uint32, what lies on it at first; the last of them is not 0.
    """

    def __init__(self, words: NDArray[np.uint32]) -> None:
        stream = coder_module()
        self._gaussian = stream.model.QuantizedGaussian
        self._coder = stream.stack.AnsCoder(words.astype(np.uint32))

    @property
    def bits(self) -> int:
        """How many bits are on the stack."""
        return int(self._coder.num_valid_bits())

    @property
    def words(self) -> NDArray[np.uint32]:
        """What is on the stack, from the bottom."""
        words: NDArray[np.uint32] = self._coder.get_compressed()
        return words

    def copy(self) -> BitStack:
        """Another stack with the same bits."""
        other = object.__new__(BitStack)
        other._gaussian, other._coder = self._gaussian, self._coder.clone()
        return other

    def mix(self, *key: int, count: int) -> None:
        """Exclusive-or of the uppermost words, but for the last, with a stream from a key: its own inverse.

        What was pushed last is popped first. Its bits are no coin tosses: they tell where each symbol lay in its p, and
        a latent that is drawn from them would have the symbol's deviation for its noise. Mixed, they are independent
        of all symbols, so that a latent's noise is what the bound takes it for.

        Args:
            count: how many words; as many as the symbols that are popped next.
        """
        words = self.words
        stop = max(len(words) - 1, 0)
        start = max(stop - count, 0)
        stream = hashlib.shake_128(repr(key).encode()).digest(4 * (stop - start))
        words[start:stop] ^= np.frombuffer(stream, "<u4")
        self._coder = coder_module().stack.AnsCoder(words)

    # --- q(z | below), in integers but for the tables of the Gaussian -------------------------------------------------

    def pop_q(self, below: Integers, level: Level) -> Integers:
        """Draw z ~ q(z | below), bins of a level, from the bits of the stack.

        Args:
            below: (n,), what the level's `q_ratio` multiplies: bins, or 2 v - 255 of pixels.

        Raises:
            StackTooShortError: before anything is popped.
        """
        std = real(level.q_std)
        self._check_bits(len(below), std)
        whole, fractions = _q_mean(below, level)
        radius = _radius(std)
        offsets = self._coder.decode(self._gaussian(-radius, radius), fractions, np.full(len(below), std))
        # A draw beyond the last bin, which is once in 10^11, enters again at the first.
        return (whole + offsets + level.half) % (2 * level.half + 1) - level.half

    def push_q(self, z: Integers, below: Integers, level: Level) -> None:
        """Put back what `pop_q` took.

        Raises:
            ValueError: for a z that it can't have returned.
        """
        std = real(level.q_std)
        whole, fractions = _q_mean(below, level)
        radius = _radius(std)
        offsets = (z - whole + radius) % (2 * level.half + 1) - radius
        if (offsets > radius).any():
            raise ValueError("a latent lies further from its image than any encoder puts it")
        model = self._gaussian(-radius, radius)
        self._coder.encode_reverse(offsets.astype(np.int32), model, fractions, np.full(len(z), std))

    # --- p(below | z), and N(0, 1) above all levels -------------------------------------------------------------------

    def push_p(
        self, symbols: Integers, mean: NDArray[np.float64], std: NDArray[np.float64], lowest: int, highest: int
    ) -> None:
        """Push symbols from lowest to highest under Gaussians, (n,)."""
        self._coder.encode_reverse(symbols.astype(np.int32), self._gaussian(lowest, highest), mean, std)

    def pop_p(self, mean: NDArray[np.float64], std: NDArray[np.float64], lowest: int, highest: int) -> Integers:
        """The symbols that `push_p` pushed with the same arguments, int64 (n,)."""
        return self._coder.decode(self._gaussian(lowest, highest), mean, std).astype(np.int64)

    def _check_bits(self, count: int, std: float) -> None:
        """The information in a draw has a standard deviation of 1/√2 nats: ten of them, of the sum, beyond its mean."""
        needed = count * math.log2(SQRT_2_PI_E * std) + 10 * 1.02 * math.sqrt(count) + 64
        if self.bits < needed:
            raise StackTooShortError(f"{self.bits} bits are on the stack, but up to {needed:.0f} are needed")


def _q_mean(below: Integers, level: Level) -> tuple[Integers, NDArray[np.float64]]:
    """The mean of q in bins: whole ones, and the rest, a multiple of 1/16."""
    shift = FRACTION - GRID
    mean = (below.astype(np.int64) * level.q_ratio + (1 << (shift - 1))) >> shift
    return mean >> GRID, (mean & ((1 << GRID) - 1)) / (1 << GRID)


def _radius(std: float) -> int:
    return math.ceil(WINDOW * std) + 1
