"""What a compression came to: rates beside the bound, what the first and the last bits cost, and times."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.pixels import LEVELS_PER_UNIT, normalize
from ..diffusion.ddpm_process import Gaussian
from .levels import Level
from .lossless import Model, Reverse, latent_bits
from .stack import Integers


@dataclass
class Report:
    """Rates are in bits/dim: bits per value of a pixel.

    Args:
        timesteps: of the levels, from the data upwards.
        terms: (K + 1,), the bound's: L_0, L_{t-1} of each level, L_T, summed over the images that are coded.
        bits: (K + 1,), those that the levels added to the stack.
        coded: how many images went through the network.
        opening: how many images before them are in PNG or WebP, whose bits the first latents borrow.
        opening_bits: what these take.
        values: of one image.
        payload_bits: of the stack in the end, the opening among them.
        file_bits: of the whole file.
        seconds: in all.
        network_seconds: of the network's calls.
    """

    timesteps: list[int]
    values: int
    terms: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    bits: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    coded: int = 0
    opening: int = 0
    opening_bits: int = 0
    payload_bits: int = 0
    file_bits: int = 0
    seconds: float = 0.0
    network_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.begin(0)

    def begin(self, opening: int) -> None:
        """Count from the start, with so many images in PNG or WebP."""
        self.terms, self.bits = np.zeros(len(self.timesteps) + 1), np.zeros(len(self.timesteps) + 1)
        self.opening, self.coded = opening, 0

    @property
    def rate(self) -> float:
        """Of the images that went through the network: what they added to the stack."""
        return (self.payload_bits - self.opening_bits) / max(self.coded * self.values, 1)

    @property
    def bound(self) -> float:
        """The variational bound on these images, with the latents that were sent."""
        return float(self.terms.sum()) / max(self.coded, 1)

    @property
    def total(self) -> float:
        """All bits of the file, by all values of all images."""
        return self.file_bits / ((self.coded + self.opening) * self.values)

    def lines(self, top: int = 5) -> Iterator[str]:
        """For people."""
        count = self.coded + self.opening
        yield f"{count} images, {self.file_bits // 8:,} bytes: {self.total:.4f} bits/dim"
        if self.opening:
            rate = self.opening_bits / (self.opening * self.values)
            yield f"  initial bits: {self.opening_bits:,}, {self.opening} images in PNG or WebP ({rate:.3f} bits/dim)"
        header = (self.file_bits - self.payload_bits) / (count * self.values)
        yield f"  header and checksums: {(self.file_bits - self.payload_bits) // 8:,} bytes ({header:.4f} bits/dim)"
        if not self.coded:
            return
        yield (
            f"  net rate of the other {self.coded}: {self.rate:.4f} bits/dim; bound {self.bound:.4f}, "
            f"overhead {self.rate - self.bound:+.4f}"
        )
        names = ["L_0", *(f"t = {t}" for t in self.timesteps[1:]), "L_T"]
        largest = sorted(range(len(names)), key=lambda i: -self.terms[i])[:top]
        yield "  most of it (sent, bound): " + ", ".join(
            f"{names[i]} {self.bits[i] / self.coded:.4f} {self.terms[i] / self.coded:.4f}" for i in sorted(largest)
        )
        share = self.network_seconds / max(self.seconds, 1e-9)
        yield f"  {self.seconds:.1f} s, of which the network took {share:.0%}"


class Watcher:
    """Collects the bits and the bound's terms of one batch; `add_to` a report once the batch is kept."""

    def __init__(self, model: Model, pixels: NDArray[np.uint8]) -> None:
        self._model, self._count = model, len(pixels)
        self._values = pixels[0].size
        self._x_0 = normalize(torch.from_numpy(pixels)).double()
        levels = model.levels
        self._bits, self._terms = np.zeros(len(levels) + 1), np.zeros(len(levels) + 1)

    def __call__(self, i: int, bits: int, reverse: Reverse, z: Integers) -> None:
        """Level i added these bits."""
        chain, levels = self._model.chain, self._model.levels
        level = levels[i]
        x_0, shape = self._x_0, self._x_0.shape
        unit = LEVELS_PER_UNIT if i == 0 else 2.0 ** levels[i - 1].exponent
        mean = torch.from_numpy(reverse.mean).reshape(shape) / unit - (1 if i == 0 else 0)
        variance = (torch.from_numpy(reverse.std).reshape(shape) / unit).square()
        p = Gaussian(mean, variance, variance.log())
        if i == 0:
            term = chain.process.L_0(x_0, p)
        else:
            x_t = torch.from_numpy(np.ldexp(z.astype(np.float64), -level.exponent)).reshape(shape)
            term = chain.process.L_t_minus_1(x_0, x_t, level.t, p, levels[i - 1].t)
        self._terms[i] = float(term.sum())
        self._bits[i] = bits / self._values + self._count * (self._latent(i) - (self._latent(i - 1) if i else 0.0))

    def add_to(self, report: Report, top_bits: int) -> None:
        """Add what was seen, and the bits of the uppermost latent under N(0, 1)."""
        chain = self._model.chain
        self._terms[-1] = float(chain.L_T(self._x_0).sum())
        self._bits[-1] = top_bits / self._values - self._count * self._latent(len(self._bits) - 2)
        report.terms += self._terms
        report.bits += self._bits
        report.coded += self._count

    def _latent(self, i: int) -> float:
        level: Level = self._model.levels[i]
        return latent_bits(level, float(self._model.chain.process.one_minus_alpha_bar(level.t)))
