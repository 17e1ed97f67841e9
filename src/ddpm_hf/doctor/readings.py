"""Which reading of a network's outputs is right: its error, at several noise levels, under every hypothesis.

A network that was trained on x_t = a x_0 + s ε with the label t predicts well only if it is asked as it was trained:
with the label that belongs to the noise (schedule and T), with images in its range and order of channels, and with
its output taken for what it is (ε, x_0 or v). All of it is measured at the same noise levels, on the same images with
the same noise, and in the same unit, ‖x_0 - x̂_0‖²/d. So errors of two hypotheses differ by the hypothesis alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..diffusion.ddpm_process import PREDICTION_TYPES, to_device
from ..progress import progress
from ..sampling.generate import eval_mode

# log-SNRs, from nearly clean to nearly noise: where readings differ, and every usual schedule has a t
LEVELS = (4.0, 2.5, 1.0, -0.5, -2.0, -3.5)
FEW_LEVELS = (3.0, 0.0, -3.0)
GOOD = 0.5  # of the error of a linear guess
FEW, FEW_VALUES = (3, 8), 8192  # so many images, of as many values in all, are enough to rank hypotheses
SAME = 1.1  # readings whose errors on few images differ by no more are compared on all
MAX_CHANNELS = 4  # of images, to try all of their orders
FLOOR_IMAGES = 2048  # whose posterior mean the floor is


@dataclass(frozen=True)
class Pixels:
    """How images in [-1, 1] became the x_0 of a training."""

    name: str
    scale: float = 1.0
    shift: float = 0.0
    order: tuple[int, ...] = ()  # of channels, as the network knows them; empty: as they are
    transposed: bool = False

    def apply(self, x: Tensor) -> Tensor:
        """x_0 as the network knows it, from images (B, C, H, W) in [-1, 1]."""
        x = x[:, list(self.order)] if self.order else x
        x = x.transpose(2, 3) if self.transposed else x
        return x * self.scale + self.shift


AS_IS = Pixels("[-1, 1]")


def other_pixels(x_0: Tensor) -> list[Pixels]:
    """All hypotheses but that images like these, (N, C, H, W), are known as they are."""
    C, H, W = x_0.shape[1:]
    orders = [order for order in permutations(range(C)) if order != tuple(range(C))] if C <= MAX_CHANNELS else []
    return [
        Pixels("[0, 1]", 0.5, 0.5),
        Pixels("[-0.5, 0.5]", 0.5),
        Pixels("inverted", -1.0),
        *(Pixels(f"images with their channels in the order {order}", order=order) for order in orders),
        *([Pixels("images with rows for columns", transposed=True)] if H == W else []),
    ]


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: its name, its configuration, and log-SNR at every t, descending."""

    name: str
    config: dict[str, Any] = field(compare=False)
    log_snr: tuple[float, ...]

    def label(self, log_snr: float) -> float:
        """The t, not always an integer, that has this log-SNR; the nearest end where none has."""
        return float(np.interp(-log_snr, -np.asarray(self.log_snr), np.arange(len(self.log_snr))))


@dataclass(frozen=True)
class Reading:
    """A hypothesis about the training."""

    schedule: Schedule
    prediction_type: str
    pixels: Pixels = AS_IS


class Errors:
    """Errors of readings of one network on one set of images.

    Args:
        network: (x_t, labels, classes) → output of shape (B, C or 2C, H, W).
        x_0: images in [-1, 1], float32 (N, C, H, W), on the network's device.
        classes: their labels, (N,), for a class-conditional network.
        seed: of the noise.
    """

    def __init__(
        self, network: nn.Module, x_0: Tensor, classes: Tensor | None = None, batch_size: int = 64, seed: int = 0
    ) -> None:
        self.network, self.x_0, self.classes, self.batch_size = network, x_0, classes, batch_size
        noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        self.noise = to_device(noise, x_0.device)
        self._known: dict[tuple[float, float, Pixels, int], Tensor] = {}

    def again(self, network: nn.Module | None = None, classes: Tensor | None = None) -> Errors:
        """The same images and noise for another network, or with other labels."""
        other = copy.copy(self)
        other.network = self.network if network is None else network
        other.classes = self.classes if classes is None else classes
        other._known = {}
        return other

    @property
    def few(self) -> int:
        """How many images rank hypotheses; the noise is the same for all, so that few suffice."""
        low, high = FEW
        return min(high, max(low, FEW_VALUES // self.x_0[0].numel()))

    def at(self, log_snr: float, label: float, pixels: Pixels, images: int) -> Tensor:
        """‖x_0 - x̂_0‖²/d by prediction type and image, float64 (3, N), of the output at one noise level and label.

        In units of images in [-1, 1], whatever range the network knows.
        """
        key = (log_snr, float(f"{label:.3g}"), pixels, images)
        if key not in self._known:
            a, s = signal_and_noise(log_snr)
            errors = []
            with eval_mode(self.network):
                for rows in torch.arange(images).split(self.batch_size):
                    x_0, noise = pixels.apply(self.x_0[rows]), self.noise[rows]
                    x_t = a * x_0 + s * noise
                    t = torch.full((len(rows),), key[1], device=x_t.device)
                    classes = None if self.classes is None else self.classes[rows]
                    output = self.network(x_t, t, class_labels=classes, return_dict=False)[0][:, : x_t.shape[1]].float()
                    by_type = torch.stack([(x_t - s * output) / a, output, a * x_t - s * output])
                    errors.append((by_type - x_0).square().flatten(2).mean(2).double().cpu())
            self._known[key] = torch.cat(errors, dim=1) / pixels.scale**2
        return self._known[key]

    def of(self, reading: Reading, levels: Sequence[float] = LEVELS, images: int | None = None) -> Tensor:
        """‖x_0 - x̂_0‖²/d of a reading by level and image, float64 (L, N)."""
        kind = PREDICTION_TYPES.index(reading.prediction_type)
        count = len(self.x_0) if images is None else min(images, len(self.x_0))
        # Noise that is as strong, relative to the images: half of their range needs half of it.
        shifted = [q - 2 * math.log(abs(reading.pixels.scale)) for q in levels]
        return torch.stack([self.at(q, reading.schedule.label(q), reading.pixels, count)[kind] for q in shifted])

    def trivial(self, levels: Sequence[float] = LEVELS) -> Tensor:
        """The error of the best linear guess, pixel by pixel, (L,).

        x̂_0 = m + k (x_t - a m) with k = a c/(a² c + s²) for a pixel of mean m and variance c has c s²/(a² c + s²). The
        images are taken for independent Gaussians, so nothing that a network could learn is in it.
        """
        c = self.x_0.double().var(0, correction=0)
        snr = torch.tensor(levels, dtype=torch.float64).exp()
        return torch.stack([(c / (c * r + 1)).mean() for r in snr]).cpu()

    @torch.no_grad()
    def floor(self, images: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
        """The least error that any function has on these very images, (L,): that of their posterior mean.

        x̂_0 = Σ w_i x_i with w = softmax(-‖x_t - a x_i‖²/(2 s²)) over `images`, float32 (M, C, H, W) in [-1, 1].
        """
        x_i = images[:FLOOR_IMAGES].flatten(1).double()
        x_0, noise = self.x_0.flatten(1).double().to(x_i.device), self.noise.flatten(1).double().to(x_i.device)
        errors = []
        for a, s in map(signal_and_noise, levels):
            x_t = a * x_0 + s * noise
            weights = (-torch.cdist(x_t, a * x_i).square() / (2 * s * s)).softmax(1)
            errors.append((weights @ x_i - x_0).square().mean())
        return torch.stack(errors).cpu()


def signal_and_noise(log_snr: float) -> tuple[float, float]:
    """Return a = sqrt(ᾱ) and s = sqrt(1 - ᾱ) at a log-SNR."""
    alpha_bar = 1 / (1 + math.exp(-log_snr))
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def excess(errors: Tensor, of_best: Tensor) -> tuple[float, float]:
    """By what factor errors, (L, N), exceed others of the same images: geometric mean over levels, and its error.

    Returns:
        The factor, and the standard error of its logarithm over images (delta method).
    """
    mean, best = errors.mean(1), of_best.mean(1)
    # the influence of an image on log(mean/best), averaged over levels
    influence = (errors / mean[:, None] - of_best / best[:, None]).mean(0)
    n = influence.shape[0]
    return math.exp(float((mean / best).log().mean())), float(influence.std(correction=0)) / max(n - 1, 1) ** 0.5


def best_reading(
    errors: Errors,
    declared: Reading,
    schedules: Sequence[Schedule],
    *,
    finalists: int = 4,
    show_progress: bool = True,
) -> Reading:
    """The reading of least error: all are tried on few images, and the best of them on all.

    The declared one wins where nothing is better.
    """
    scores: dict[Reading, float] = {}

    def rank(candidates: Sequence[Reading], title: str) -> list[Reading]:
        for c in progress(candidates, desc=title, unit="reading", is_shown=show_progress, leave=False):
            if c not in scores:
                scores[c] = _score(errors.of(c, FEW_LEVELS, errors.few))
        return sorted(scores, key=scores.__getitem__)

    of_schedules = [Reading(schedule, kind) for schedule in schedules for kind in PREDICTION_TYPES]
    ranking = rank([declared, *of_schedules], "Schedules")
    # If a schedule is good, images are as they should be for it, or nearly: others are tried with the best ones only.
    is_good = scores[ranking[0]] < float(errors.trivial(FEW_LEVELS).log().mean()) + math.log(GOOD)
    likely = ranking[: 2 if is_good else 2 * finalists]
    likely += [c for kind in PREDICTION_TYPES if (c := replace(declared, prediction_type=kind)) not in likely]
    ranking = rank([replace(c, pixels=p) for p in other_pixels(errors.x_0) for c in likely], "Pixels")
    close = [c for c in ranking[:finalists] if scores[c] < scores[ranking[0]] + math.log(SAME)]
    # the declared one; and its schedule with everything else of the best: is only the schedule to blame?
    final = dict.fromkeys((declared, *close, replace(ranking[0], schedule=declared.schedule)))
    return min(final, key=lambda c: _score(errors.of(c)))


def _score(errors: Tensor) -> float:
    """Mean log error over levels; infinite for NaN."""
    score = float(errors.mean(1).log().mean())
    return score if math.isfinite(score) else math.inf
