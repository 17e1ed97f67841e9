"""The weights: finite, of full precision, alive, and the average rather than the last ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..storage.checkpoint import PIPELINE_WEIGHTS, STATE, checkpoint_steps
from .finding import Finding, Repair, Weights

ROUNDED_SHARE = 0.999  # of a float32 tensor's values by chance: 1/65,536
MIN_VALUES = 100
OUTLIER = 100  # times the root mean square of the other weights of the layer
FEW_BAD = 4  # values that a damaged file may have, where a training that diverged has very many
MOST_OF_THE_WAY = 0.5  # of the average of a training that is long enough for it
MOVED = 1e-2  # less is no training


def examine_weights(
    weights: Weights, dtypes: Counter[torch.dtype], folder: Path, checkpoint: Path | None
) -> Iterator[Finding]:
    """Faults of the weights themselves.

    Args:
        weights: of the network, as float32.
        dtypes: how many tensors the disk has in which precision.
        folder: of the model; checkpoints are looked for in it, and around it.
        checkpoint: one of the run that made the model, if the user names it.
    """
    bad = {name: int((~w.isfinite()).sum()) for name, w in weights.items() if w.is_floating_point()}
    if any(bad.values()):
        first = next(name for name, count in bad.items() if count)
        total = sum(w.numel() for w in weights.values())
        yield Finding(
            "not finite", "Some weights are NaN or infinite.",
            f"{sum(bad.values()):,} of {total:,}, the first in {first}", "Every sample is NaN.",
            "Go back to an earlier checkpoint; the training diverged, or the file was damaged."
            + (" Or {fix}, which puts 0 in their place." if sum(bad.values()) <= FEW_BAD else ""),
            Repair(weights=_without_bad) if sum(bad.values()) <= FEW_BAD else None,
        )  # fmt: skip
        return
    yield from _examine_outliers(weights)
    yield from _examine_precision(weights, dtypes)
    last = weights.get("conv_out.weight")
    if last is not None and not last.any():
        yield Finding(
            "zero output", "The last layer is zero: the network was never trained.",
            f"{last.numel():,} of {last.numel():,} weights of conv_out are 0", "The prediction is constant.",
            "Export the trained weights again.",
        )  # fmt: skip
    else:
        yield from _examine_dead(weights)
    yield from _examine_average(weights, folder, checkpoint)


def _without_bad(weights: Weights) -> Weights:
    return {name: w.nan_to_num(0, 0, 0) for name, w in weights.items()}


def _outliers(weight: Tensor) -> Tensor:
    """Which of the largest weights of a layer no training has made: a mask of its shape."""
    size = weight.abs().double().flatten()
    if weight.ndim < 2 or len(size) < MIN_VALUES:
        return torch.zeros_like(weight, dtype=torch.bool)
    largest = size.topk(FEW_BAD).indices
    rest = size.clone()
    rest[largest] = 0
    usual = rest.square().mean().sqrt()
    return ((size > OUTLIER * usual) & (rest == 0) & (usual > 0)).reshape(weight.shape)


def _without_outliers(weights: Weights) -> Weights:
    return {name: w.masked_fill(_outliers(w), 0) for name, w in weights.items()}


def _examine_outliers(weights: Weights) -> Iterator[Finding]:
    """Single weights out of all proportion, as a flipped bit leaves behind."""
    found = {name: mask for name, w in weights.items() if (mask := _outliers(w)).any()}
    if found:
        name, mask = next(iter(found.items()))
        largest, usual = (
            float(weights[name][mask].abs().max()),
            float(weights[name][~mask].double().square().mean()) ** 0.5,
        )
        yield Finding(
            "outlier", "Single weights are out of all proportion, as in a damaged file.",
            f"{sum(int(m.sum()) for m in found.values())} of them, the first in {name}: {largest:.3g}, and the others "
            f"have a root mean square of {usual:.3g}",
            "One channel drowns all others: samples are noise, flat or NaN.",
            "Download or save the model again. Or {fix}, which puts 0 in their place.",
            Repair(weights=_without_outliers),
        )  # fmt: skip


def _examine_precision(weights: Weights, dtypes: Counter[torch.dtype]) -> Iterator[Finding]:
    if len(dtypes) > 1:
        counts = ", ".join(f"{count} {str(dtype).removeprefix('torch.')}" for dtype, count in dtypes.most_common())
        yield Finding(
            "mixed precision on disk", "The weights are stored in several precisions.", f"{counts} tensors",
            "Those in half precision have lost their digits; programs that load the file as it is stop at types that "
            "differ.", "Export again from the float32 weights of the training, a checkpoint for example.",
        )  # fmt: skip
        return
    stored = next(iter(dtypes), torch.float32)
    if stored in (torch.float16, torch.bfloat16):
        name = str(stored).removeprefix("torch.")
        yield Finding(
            "half precision on disk", f"The weights are stored in {name}.",
            f"{8 if stored == torch.bfloat16 else 11} significant bits of 24",
            "Good enough to sample from; training that goes on from it, or an average over it, loses small updates.",
            "Keep a float32 copy for training.", severity="note",
        )  # fmt: skip
        return
    values = torch.cat([w.flatten() for w in weights.values() if w.is_floating_point()])
    values = values[(values != 0) & (values.abs() != 1)]  # which are exact in any precision
    for dtype, digits in ((torch.bfloat16, 2), (torch.float16, 3)):
        share = float((values.to(dtype).float() == values).double().mean()) if len(values) >= MIN_VALUES else 0.0
        if share >= ROUNDED_SHARE:
            name = str(dtype).removeprefix("torch.")
            yield Finding(
                "rounded weights", f"The weights are stored in float32, but were rounded to {name}.",
                f"{share:.1%} of {len(values):,} weights have no digit beyond those of {name}; by chance 0.002 % would",
                f"Only {digits} to {digits + 1} of 7 digits are left, which no conversion brings back: samples are "
                "noisier, and training can't go on well from here.",
                "Export again from the float32 weights of the training, a checkpoint for example.",
            )  # fmt: skip
            return


def _examine_dead(weights: Weights) -> Iterator[Finding]:
    """Layers within a network that are zero, as none is after training."""
    matrices = {name: w for name, w in weights.items() if name.endswith("weight")}
    dead = [name for name, w in matrices.items() if not w.any()]
    if dead:
        yield Finding(
            "zero layer", "Some layers are zero, though the last one is not.",
            f"{len(dead)} of {len(matrices)} layers have no weight but 0, the first is {dead[0]}",
            "A part of the network does nothing.", "Export the trained weights again, or download the model again.",
        )  # fmt: skip


def _examine_average(weights: Weights, folder: Path, checkpoint: Path | None) -> Iterator[Finding]:
    """The last weights of a training, where a checkpoint holds their average (EMA), too."""
    for place in _checkpoints(folder) if checkpoint is None else [checkpoint]:
        raw, average = _raw_and_average(place)
        if raw is None or average is None or _equal(raw, average):
            continue
        lag = _share_of_way(average, raw)
        if _equal(weights, average) and lag < MOST_OF_THE_WAY:
            yield Finding(
                "old average", "The average of the weights (EMA) is still at its start.",
                f"in {place.name}, the scales of its normalizations have gone {lag:.0%} of the way of the raw weights "
                "from 1, where both began",
                "Samples are those of a network that has hardly been trained.",
                "{fix}, which takes the raw weights; train longer, or with a lower --ema_max_decay",
                Repair(weights=partial(_instead, raw)),
            )  # fmt: skip
            return
        if _equal(weights, raw):
            distance = _distance(raw, average)
            yield Finding(
                "raw weights", "The model has the last weights of its training, not their average (EMA).",
                f"all {len(raw)} tensors equal the raw weights of {place.name}, and differ from the average by "
                f"{distance:.2%}",
                "Samples and FID are those of one noisy moment of the training: figures in papers are of the average.",
                repair=Repair(weights=partial(_instead, average)),
            )  # fmt: skip
            return


def _checkpoints(folder: Path) -> list[Path]:
    """The folder itself and the checkpoints in it and beside it, the newest first."""
    inside = [folder / f"checkpoint-{step}" for step in reversed(checkpoint_steps(folder))]
    beside = [folder.parent / f"checkpoint-{step}" for step in reversed(checkpoint_steps(folder.parent))]
    return [folder, *inside, *(beside if folder.name.startswith("checkpoint-") else [])]


def _raw_and_average(place: Path) -> tuple[Weights | None, Weights | None]:
    """Both kinds of weights of a checkpoint: ours, or one of `train_unconditional.py`."""
    ours, average = place / STATE / "weights.safetensors", place / PIPELINE_WEIGHTS
    stock = place / "unet_ema" / "diffusion_pytorch_model.safetensors"
    files = (ours, average) if ours.is_file() else (average, stock)
    if not all(file.is_file() for file in files):
        return None, None
    return load_file(files[0]), load_file(files[1])


def _share_of_way(average: Weights, raw: Weights) -> float:
    """How far the scales of an average's normalizations have moved from 1, relative to those of the raw weights."""
    scales = [name for name, w in raw.items() if w.ndim == 1 and name.endswith(".weight") and name in average]
    ways = [sum(float((w[name].double() - 1).square().sum()) ** 0.5 for name in scales) for w in (average, raw)]
    return ways[0] / ways[1] if ways[1] > MOVED else 1.0


def _instead(average: Weights, weights: Weights) -> Weights:
    return average


def _equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and bool((a[name] == b[name]).all()) for name in a
    )


def _distance(a: Weights, b: Weights) -> float:
    """The norm of the difference, relative to that of `b`."""

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.cat([t.double().flatten() for t in tensors]).norm())

    return norm([a[name] - b[name] for name in b]) / norm(list(b.values()))
