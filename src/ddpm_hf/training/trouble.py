"""What goes wrong in a run, named from what its log already holds: pure functions of history, data and samples.

Each rule is made so that a run that learns keeps silent: it wants a difference that chance does not make.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor

from ..config.training import TrainConfig

NOISE, NOISE_OF_REAL = 1.2, 2.0  # the least roughness of noise, and the least in that of real images
BLOCK = 10  # entries of the log whose median is compared: 100 updates
HISTORY = 1000  # entries that are looked at: 10,000 updates
FIRST_UPDATES = 200  # after them, a network must be better than one that predicts nothing
MANY_OVERFLOWS = 0.02  # of the updates; a loss scaler that has settled causes one in 2,000
LATE_HALF = 0.25  # the most of an average that may come from the first half of a run
NARROW = 0.2  # of the range of pixels that the images use
SATURATED = 0.25  # more pixels at either end of the range than real images have
WORSE_IN_A_ROW = 3  # validations
MANY_COPIES = 0.1  # of the samples
FEW_IMAGES = 100


class Trouble(NamedTuple):
    """One thing that goes wrong: its kind, what it is, what was measured, and what to do."""

    name: str
    what: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.evidence}. {self.remedy}"


Entries = Sequence[Mapping[str, Any]]


def in_data(pixels: Tensor, num_images: int | None) -> Iterator[Trouble]:
    """What is wrong with the images, before anything is learned from them.

    Args:
        pixels: some of them, uint8 of shape (N, C, H, W).
        num_images: how many there are; None for a stream.
    """
    values = pixels.flatten(1).float()
    spread, low, high = values.max(0).values - values.min(0).values, int(values.min()), int(values.max())
    if len(pixels) > 1 and not spread.any():
        yield Trouble(
            "equal_images", "The images are all the same", f"{len(pixels)} drawn at random do not differ in any pixel",
            "Look at the data: --image_column may name the wrong column.",
        )  # fmt: skip
    elif high - low < NARROW * 255:
        yield Trouble(
            "narrow_range", "The images use a small part of the range of pixels",
            f"those of {len(pixels)} images lie between {low} and {high} of 0 to 255",
            "Rescale the files: they may hold 0 to 1, or 12 of 16 bits.",
        )  # fmt: skip
    if num_images is not None and num_images < FEW_IMAGES:
        yield Trouble(
            "few_images", "There are few images to learn from", f"{num_images}, and {FEW_IMAGES} would be few",
            "Expect copies of them and mixtures rather than new images: collect more, or pass --random_flip if mirror "
            "images are plausible.",
        )  # fmt: skip


def in_log(entries: Entries, config: TrainConfig, trivial: float | None, *, is_fp16: bool) -> Iterator[Trouble]:
    """What the losses and gradients of a run betray.

    Args:
        entries: of the log, oldest first.
        trivial: the loss of a network that predicts 0 (`losses.trivial_loss`), or None where that is unknown.
        is_fp16: whether a loss scaler makes up for the range of float16, and skips updates in which it overflows.
    """
    recent = [e for e in entries[-HISTORY:] if "lr" in e]  # of updates, not of validations
    if recent:
        yield from _of_loss(recent, config, trivial)
        yield from _of_gradients(recent, config)
        yield from _of_skipped(recent, is_fp16)


def _of_loss(entries: Entries, config: TrainConfig, trivial: float | None) -> Iterator[Trouble]:
    last, step = [e.get("loss", math.inf) for e in entries[-3:]], entries[-1]["step"]
    if trivial is not None and len(last) == 3 and median(last) > 10 * trivial:
        yield Trouble(
            "diverging", "The loss diverges",
            f"{median(last):.3g} at update {step:,}, where predicting nothing costs {trivial:.3g}",
            _lower(config.learning_rate / 10),
        )  # fmt: skip
        return
    risen = _risen(entries, "loss")
    if risen is not None:
        best, now, where = risen
        rate, rate_now = where["lr"], entries[-1]["lr"]
        evidence = f"its median over {BLOCK * 10} updates was {best:.3g} at update {where['step']:,} and is {now:.3g}"
        if now > 1.25 * best and rate_now > 1.2 * rate:  # the warm-up is a search for the largest rate that works
            yield Trouble(
                "high_learning_rate", "The learning rate is above where the loss turns",
                f"{evidence} at update {step:,}, while the rate rose from {rate:.2g} to {rate_now:.2g}",
                _lower(rate / 2),
            )  # fmt: skip
        elif now > 2 * best:
            yield Trouble(
                "diverging", "The loss diverges", f"{evidence} at update {step:,}", _lower(config.learning_rate / 3)
            )
    if trivial is not None and step >= max(FIRST_UPDATES, config.lr_warmup_steps) and len(entries) >= BLOCK:
        now = median(e.get("loss", math.inf) for e in entries[-BLOCK:])
        if 0.95 * trivial <= now:
            yield Trouble(
                "stuck", "The network has learned nothing",
                f"its loss is {now:.3g} after {step:,} updates, and predicting nothing costs {trivial:.3g}",
                _lower(config.learning_rate / 10),
            )  # fmt: skip


def _of_gradients(entries: Entries, config: TrainConfig) -> Iterator[Trouble]:
    risen = _risen(entries, "grad_norm")
    if risen is not None and risen[1] > max(10 * risen[0], min(config.max_grad_norm, 1.0)):
        best, now, where = risen
        yield Trouble(
            "exploding_gradients", "The gradients explode",
            f"their norm was {best:.2g} at update {where['step']:,} and is {now:.2g} at update "
            f"{entries[-1]['step']:,}",
            _lower(config.learning_rate / 3),
        )  # fmt: skip


def _of_skipped(entries: Entries, is_fp16: bool) -> Iterator[Trouble]:
    steps = entries[-1]["step"]
    if not is_fp16:
        count = sum(e.get("skipped", 0) for e in entries[-BLOCK:])
        if count:
            yield Trouble(
                "gradients_not_finite", "Gradients are not finite",
                f"{count:g} of the last {10 * min(BLOCK, len(entries))} updates were skipped, up to update {steps:,}",
                "Lower --learning_rate, and look at the images if it stays so.",
            )  # fmt: skip
        return
    settled = [e for e in entries[-50:] if e["step"] > 100]  # at first, the scaler searches for its scale
    count = sum(e.get("skipped", 0) for e in settled)
    if len(settled) >= 20 and count > MANY_OVERFLOWS * 10 * len(settled):
        yield Trouble(
            "float16_overflows", "float16 overflows",
            f"{count:g} of the last {10 * len(settled)} updates were skipped, up to update {steps:,}",
            "Pass --mixed_precision bf16, or no.",
        )  # fmt: skip


def in_average(entries: Entries) -> Iterator[Trouble]:
    """Whether the moving average is still made of early weights.

    The average after n updates holds weights of before update n/2 with a share of Π d_k, k = n/2 + 1 … n, for decays d.

    Args:
        entries: all of the log.
    """
    of_average = [e for e in entries if "ema_decay" in e]
    if not of_average or of_average[-1]["step"] < 100:
        return
    done, share = of_average[-1]["step"], 1.0
    for before, entry in pairwise(of_average):
        since = max(before["step"], done / 2)
        if entry["step"] > since:
            share *= entry["ema_decay"] ** (entry["step"] - since)
    if share > LATE_HALF:
        yield Trouble(
            "old_average", "The average of the weights (EMA) is still at its start",
            f"{share:.0%} of it come from the first half of the {done:,} updates so far",
            "Train longer, or lower --ema_max_decay or --ema_power: samples are made with this average.",
        )  # fmt: skip


def in_samples(samples: Tensor, real: Tensor) -> Iterator[Trouble]:
    """What samples betray in the second half of a run. Both are uint8 of shape (N, C, H, W)."""
    shares = [float(((x == 0) | (x == 255)).float().mean()) for x in (samples, real)]
    if shares[0] > shares[1] + SATURATED:
        yield Trouble(
            "saturated_samples", "The samples saturate",
            f"{shares[0]:.0%} of their values are 0 or 255, and {shares[1]:.0%} of those of real images",
            "Train longer, or lower --learning_rate; `ddpm-hf doctor` examines the model.",
        )  # fmt: skip
    blank, blank_real = (int((x.flatten(1).float().std(1) < 2).sum()) for x in (samples, real))
    if blank > len(samples) / 2 and not blank_real:
        yield Trouble(
            "blank_samples", "The samples are blank", f"{blank} of {len(samples)} have a single shade, and no real one",
            "Train longer, or lower --learning_rate; `ddpm-hf doctor` examines the model.",
        )  # fmt: skip


def in_last_samples(samples: Tensor, real: Tensor) -> Iterator[Trouble]:
    """Whether the samples of a finished run are still noise. Both are uint8 of shape (N, C, H, W).

    The squared difference of neighbouring pixels is twice the variance where they are independent, and far less in
    pictures.
    """
    of_samples, of_real = (_roughness(x) for x in (samples, real))
    if of_samples > max(NOISE, NOISE_OF_REAL * of_real):
        yield Trouble(
            "noisy_samples", "The samples are little more than noise",
            f"the squared difference of neighbouring pixels is {of_samples:.1f} of their variance, in real images "
            f"{of_real:.1f}, in pure noise 2",
            "Train longer: a run with a time budget is continued by `--time_budget +30m`.",
        )  # fmt: skip


def _roughness(pixels: Tensor) -> float:
    """The median over images of the squared difference of neighbours in a row, in units of the image's variance."""
    x = pixels.double()
    return float((x.diff(dim=-1).square().mean((1, 2, 3)) / (x.var((2, 3)).mean(1) + 1e-9)).median())


def in_validations(validations: Entries, config: TrainConfig) -> Iterator[Trouble]:
    """Overfitting: the model gets better on what it was trained on, and worse on what it was not."""
    metric = f"eval_{config.metric_for_best_model}"
    measured = [e for e in validations if metric in e]
    later = [] if not measured else measured[measured.index(min(measured, key=lambda e: e[metric])) + 1 :]
    if len(later) >= WORSE_IN_A_ROW and later[-1][metric] > 1.01 * measured[-len(later) - 1][metric]:
        best = measured[-len(later) - 1]
        yield Trouble(
            "overfitting", "The model overfits",
            f"on held-out images, {config.metric_for_best_model} was {best[metric]:.4g} after update "
            f"{best['step']:,} and is {later[-1][metric]:.4g} after update {later[-1]['step']:,}",
            "Export the best checkpoint with --load_best_model_at_end, and stop in time with "
            "--early_stopping_patience 3.",
        )  # fmt: skip


def in_copies(copies: int, samples: int, expected: float) -> Iterator[Trouble]:
    """Samples that copy training images.

    Args:
        copies: how many of the samples do.
        samples: how many there are.
        expected: the share of copies among images that the model has not seen.
    """
    if copies >= 2 and copies / samples > MANY_COPIES + expected:
        yield Trouble(
            "copies", "Samples copy training images", f"{copies} of {samples} do",
            "Use more images, fewer updates or a smaller network, or stop in time with --eval_steps and "
            "--early_stopping_patience 3.",
        )  # fmt: skip


def _risen(entries: Entries, name: str) -> tuple[float, float, Mapping[str, Any]] | None:
    """Whether a value has risen beyond chance: all of its last block lies above all of its lowest one.

    Returns:
        The lowest median of a block, that of the last one, and the entry at the end of the lowest one.
    """
    known = [(e.get(name, math.inf), e) for e in entries]
    blocks = [known[i : i + BLOCK] for i in range(len(known) % BLOCK, len(known), BLOCK)]
    if len(blocks) < 2:
        return None
    medians = [median(value for value, _ in block) for block in blocks]
    lowest = min(range(len(blocks)), key=medians.__getitem__)
    if min(value for value, _ in blocks[-1]) <= max(value for value, _ in blocks[lowest]):
        return None
    return medians[lowest], medians[-1], blocks[lowest][-1][1]


def _lower(rate: float) -> str:
    return f"Lower the learning rate: --learning_rate {rate:.1g}."
