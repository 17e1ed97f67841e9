"""Single layers that a conversion or a damaged file has changed: the error on images says which change to undo."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from diffusers import UNet2DModel
from torch import Tensor

from .finding import Finding, Repair, Weights
from .readings import FEW_LEVELS, LEVELS, Errors, Reading, excess

EXCESS = 1.01  # of the error as it is over that with a layer turned back
EXCESS_OF_GAIN = 1.15  # and with another gain, which may make up for a fault elsewhere
SIGMAS = 4.0  # and by as many standard errors
FEW = 8  # images with which changes are tried, before the best one is measured on all
FINALISTS = 2
GAINS = (0.5, 0.8, 1.25, 2.0)


class Change(NamedTuple):
    """A change of one layer, in words, with what undoes it."""

    what: str
    layer: str
    undo: Callable[[Tensor], Tensor]
    excess: float = EXCESS


def examine_layers(unet: UNet2DModel, errors: Errors, declared: Reading, best: Reading) -> tuple[Change | None, float]:
    """The change of one layer that is the most likely to have been made, and to what its undoing lowers the error.

    Args:
        declared: how the scheduler reads the network.
        best: the reading of least error of the network as it is.

    Returns:
        None where nothing lowers the error beyond doubt.
    """
    readings = {declared, best}
    weights = unet.state_dict()
    network = copy.deepcopy(unet)
    of_best = errors.of(best, FEW_LEVELS, FEW)

    def measured(change: Change, images: int | None, levels: tuple[float, ...]) -> list[Tensor]:
        """Errors with the change undone, by reading."""
        parameter = network.get_parameter(change.layer)
        parameter.data = change.undo(weights[change.layer])
        changed = Errors(network, errors.x_0, errors.classes, errors.batch_size)
        found = [changed.of(reading, levels, images) for reading in readings]
        parameter.data = weights[change.layer]
        return found

    def factor(change: Change) -> float:
        factors = [excess(found, of_best)[0] for found in measured(change, FEW, FEW_LEVELS)]
        return min((f for f in factors if f == f), default=1.0)

    tried = [(factor(change), change) for change in _changes(weights)]
    for few, change in sorted(tried, key=lambda pair: pair[0])[:FINALISTS]:
        for found in measured(change, None, LEVELS) if few < 1 else ():
            ratio, error = excess(found, errors.of(best))
            if 1 / ratio > max(change.excess, 1 + SIGMAS * error):
                return change, ratio
    return None, 1.0


def finding(change: Change, ratio: float, errors: Errors) -> Finding:
    """What a change of a layer means."""
    return Finding(
        "layer", f"A layer was changed after training: {change.what}.",
        f"with {change.layer} as it was, the error on {len(errors.x_0)} images falls to {ratio:.2f} of what it is",
        "Every network call is wrong by as much: samples are noisy, blurred or pale.",
        repair=Repair(weights=partial(_undone, change)),
    )  # fmt: skip


def undone(unet: UNet2DModel, change: Change) -> UNet2DModel:
    """The network with a change undone."""
    network = copy.deepcopy(unet)
    network.load_state_dict(_undone(change, dict(unet.state_dict())))
    return network


def _undone(change: Change, weights: Weights) -> Weights:
    return {**weights, change.layer: change.undo(weights[change.layer]).contiguous()}


def _changes(weights: Weights) -> Iterator[Change]:
    """What is tried: square layers transposed, kernels transposed, and the gain of the first and the last layer."""
    for name, weight in weights.items():
        if weight.ndim in (2, 4) and weight.shape[0] == weight.shape[1]:
            yield Change("its inputs and outputs are swapped", name, lambda w: w.transpose(0, 1))
        if weight.ndim == 4 and weight.shape[2] == weight.shape[3] > 1:
            yield Change("the height and width of its kernels are swapped", name, lambda w: w.transpose(2, 3))
    for name in ("conv_in.weight", "conv_out.weight"):
        for gain in GAINS if name in weights else ():
            yield Change(
                f"its weights are {1 / gain:g} times what they were", name, partial(_scaled, gain), EXCESS_OF_GAIN
            )


def _scaled(gain: float, weight: Tensor) -> Tensor:
    return gain * weight
