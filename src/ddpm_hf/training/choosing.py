"""At the end of a run with several averages of the weights: held-out images choose the one that is exported."""

from __future__ import annotations

import math

import torch
from diffusers.training_utils import EMAModel

from ..data.pixels import normalize
from ..distributed import gather_lockstep, lockstep_batches
from .averages import LOSSES, PowerFunctionEMA
from .losses import training_losses
from .network import ema_weights
from .state import Run
from .validation_set import ValidationSet


@torch.no_grad()
def choose_average(run: Run, validation_set: ValidationSet) -> str:
    """Make the average with the least loss on held-out images the one that is exported. All processes must call it.

    All have the same noise and timesteps, so that small differences show.

    Returns:
        What was compared, in a line.
    """
    if not isinstance(run.ema, PowerFunctionEMA):
        raise TypeError("only averages of several widths can be compared")
    candidates = [run.ema, *run.other_averages]
    losses = [_held_out_loss(run, validation_set, average) for average in candidates]
    by_width = sorted((average.width, loss) for average, loss in zip(candidates, losses, strict=True))
    best = min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    run.ema = candidates.pop(best)
    run.other_averages = candidates
    compared = ", ".join(f"{loss:.5f} of width {width:g}" for width, loss in by_width)
    return f"Averages of the weights by their loss on held-out images: {compared}. The least is exported."


def _held_out_loss(run: Run, validation_set: ValidationSet, ema: EMAModel | None) -> float:
    """The mean loss on the held-out images."""
    images, labels, device = validation_set.pixels, validation_set.labels, run.accelerator.device
    rounds = max(1, math.ceil(LOSSES / len(images)))
    batches = lockstep_batches(rounds * len(images), run.plan.inference_batch)
    run.unet.eval()
    values = []
    with ema_weights(ema, run.unet):
        for number, indices in enumerate(batches):
            places = indices % len(images)
            part = number * run.plan.num_processes + run.accelerator.process_index
            torch.manual_seed(run.config.seed + part)
            chosen = None if labels is None else labels[places].to(device)
            x_0 = normalize(images[places].to(device))
            values.append(training_losses(run.unet, run.scheduler.process, x_0, chosen, run.config)[0])
    run.unet.train()
    return float(gather_lockstep(torch.cat(values), rounds * len(images)).mean())
