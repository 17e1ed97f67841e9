"""Single layers that a conversion or a damaged file has changed: the error on images says which change to undo.

One backward pass predicts what every change would do to the error, to first order: ⟨∂ log error/∂w, w' - w⟩. In a
trained network that is next to nothing for all of them; where a layer was changed, undoing it leads. Only the most
promising ones are measured.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, permutations
from typing import NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor

from .finding import Finding, Repair, Weights
from .readings import FEW_LEVELS, LEVELS, MAX_CHANNELS, Errors, Reading, excess

EXCESS = 1.01  # of the error as it is over that with a layer turned back
EXCESS_OF_GAIN = 1.15  # and with another gain, which may make up for a fault elsewhere
SIGMAS = 4.0  # and by as many standard errors
OF_GRADIENT = 16  # images that the prediction is made from
MOST_LIKELY, FINALISTS = 8, 2
LAYERS_OF_GAIN = 3
GAINS = (0.1, 0.5, 0.8, 1.25, 2.0, 10.0)


class Change(NamedTuple):
    """A change of a layer, in words, with what undoes it: the tensors that it changes, as they were."""

    what: str
    layer: str
    undo: Callable[[Weights], Weights]
    excess: float = EXCESS


def examine_layers(unet: UNet2DModel, errors: Errors, declared: Reading, best: Reading) -> tuple[Change | None, float]:
    """The change of one layer that is the most likely to have been made, and to what its undoing lowers the error.

    Args:
        declared: how the scheduler reads the network.
        best: the reading of least error of the network as it is.

    Returns:
        None where nothing lowers the error beyond doubt.
    """
    readings = list(dict.fromkeys((declared, best)))
    network = copy.deepcopy(unet)
    weights = dict(unet.state_dict())
    changes = _most_likely(network, weights, errors, readings)
    of_best = errors.of(best, FEW_LEVELS, errors.few)

    def measured(change: Change, images: int | None, levels: tuple[float, ...]) -> list[Tensor]:
        """Errors with the change undone, by reading."""
        network.load_state_dict(undone(change, weights))
        changed = errors.again(network)
        return [changed.of(reading, levels, images) for reading in readings]

    def factor(change: Change) -> float:
        factors = [excess(found, of_best)[0] for found in measured(change, errors.few, FEW_LEVELS)]
        return min((f for f in factors if f == f), default=1.0)

    tried = [(factor(change), change) for change in changes]
    found: list[tuple[float, Change]] = []
    for few, change in sorted(tried, key=lambda pair: pair[0])[:FINALISTS]:
        for with_it in measured(change, None, LEVELS) if few < change.excess**-0.5 else ():
            ratio, error = excess(with_it, errors.of(best))
            if 1 / ratio > max(change.excess, 1 + SIGMAS * error):
                found.append((ratio, change))
    if not found:
        return None, 1.0
    ratio, change = min(found, key=lambda pair: pair[0])
    return change, ratio


def finding(change: Change, ratio: float, errors: Errors) -> Finding:
    """What a change of a layer means."""
    return Finding(
        "layer", f"A layer was changed after training: {change.what}.",
        f"with {change.layer} as it was, the error on {len(errors.x_0)} images falls to {ratio:.2f} of what it is",
        "Every network call is wrong by as much: samples are noisy, blurred or pale.",
        repair=Repair(weights=partial(undone, change)),
    )  # fmt: skip


def undone(change: Change, weights: Weights) -> Weights:
    """All weights, with a change undone."""
    return {**weights, **change.undo(weights)}


def _most_likely(network: UNet2DModel, weights: Weights, errors: Errors, readings: list[Reading]) -> list[Change]:
    """The changes whose undoing promises most, and gains of the layers whose gain does."""
    by_reading = [_gradients(network, errors, reading) for reading in readings]

    def promise(change: Change) -> float:
        changed = change.undo(weights)
        return min(sum(float((g[n] * (w - weights[n])).sum()) for n, w in changed.items()) for g in by_reading)

    promises = {change: promise(change) for change in _changes(weights)}
    ranking = sorted((change for change, p in promises.items() if p < 0), key=promises.__getitem__)
    gains = [change for change in ranking if change.excess == EXCESS_OF_GAIN]
    layers = list(dict.fromkeys(change.layer for change in gains))[:LAYERS_OF_GAIN]
    others = [change for change in ranking if change.excess == EXCESS]
    return [*others[:MOST_LIKELY], *(change for change in gains if change.layer in layers)]


def _gradients(network: UNet2DModel, errors: Errors, reading: Reading) -> Weights:
    """Of the mean log error of a reading by every parameter."""
    network.requires_grad_(True)
    with torch.enable_grad():
        parameters = dict(network.named_parameters())
        few = Errors(network, errors.x_0[:OF_GRADIENT], errors.classes, errors.batch_size)
        found = few.of(reading, FEW_LEVELS).mean(1).log().mean()
        gradients = torch.autograd.grad(found, list(parameters.values()), allow_unused=True)
    network.requires_grad_(False)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient.nan_to_num()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


# --- what is tried ----------------------------------------------------------------------------------------------------


def _changes(weights: Weights) -> Iterator[Change]:
    """Layers transposed, rotated, exchanged, scaled, or with the channels of images in another order."""
    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, weight in weights.items():
        if weight.ndim not in (2, 4):
            continue
        alike[tuple(weight.shape)].append(name)
        if weight.shape[0] == weight.shape[1]:
            yield Change("its inputs and outputs are swapped", name, partial(_transposed, name, 0, 1))
        if weight.ndim == 4 and weight.shape[2] == weight.shape[3] > 1:
            yield Change("the height and width of its kernels are swapped", name, partial(_transposed, name, 2, 3))
            yield Change("its kernels are turned by 180°", name, partial(_rotated, name))
        for gain in GAINS:
            what = f"its weights are {1 / gain:g} times what they were"
            yield Change(what, name, partial(_scaled, gain, name), EXCESS_OF_GAIN)
    for names in alike.values():
        for a, b in combinations(names, 2):
            yield Change(f"it is exchanged with {b}", a, partial(_exchanged, [(a, b)]))
            biases = (a.removesuffix("weight") + "bias", b.removesuffix("weight") + "bias")
            if all(bias in weights for bias in biases):
                whole = partial(_exchanged, [(a, b), biases])
                yield Change(f"it is exchanged with {b}, bias and all", a, whole)
    yield from _orders_of_channels(weights)


def _orders_of_channels(weights: Weights) -> Iterator[Change]:
    """The channels of images in another order at one end of the network only."""
    channels = weights["conv_in.weight"].shape[1] if "conv_in.weight" in weights else 0
    for order in permutations(range(channels)) if channels <= MAX_CHANNELS else ():
        if order == tuple(range(channels)):
            continue
        what = f"the channels of its {{}} are in the order {', '.join(map(str, order))}"
        yield Change(what.format("input"), "conv_in.weight", partial(_with_inputs_in, order))
        yield Change(what.format("output"), "conv_out.weight", partial(_with_outputs_in, order))


def _transposed(name: str, a: int, b: int, weights: Weights) -> Weights:
    return {name: weights[name].transpose(a, b).contiguous()}


def _rotated(name: str, weights: Weights) -> Weights:
    return {name: weights[name].flip(2, 3)}


def _scaled(gain: float, name: str, weights: Weights) -> Weights:
    return {name: gain * weights[name]}


def _exchanged(pairs: list[tuple[str, str]], weights: Weights) -> Weights:
    return {name: weights[other] for a, b in pairs for name, other in ((a, b), (b, a))}


def _with_inputs_in(order: tuple[int, ...], weights: Weights) -> Weights:
    return {"conv_in.weight": weights["conv_in.weight"][:, list(order)]}


def _with_outputs_in(order: tuple[int, ...], weights: Weights) -> Weights:
    """The last layer with the channels of images in another order: in the learned variance, too."""
    names = ("conv_out.weight", "conv_out.bias")
    return {n: torch.cat([part[list(order)] for part in weights[n].split(len(order))]) for n in names}


def reorder_channels(order: tuple[int, ...], weights: Weights) -> Weights:
    """The same network for images with their channels in another order: its first and last layer, permuted."""
    return {**weights, **_with_inputs_in(order, weights), **_with_outputs_in(order, weights)}
