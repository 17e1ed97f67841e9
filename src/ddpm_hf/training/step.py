"""The parts of one update: accumulate gradients, update the weights, update their moving average.

Randomness is a function of progress: what is drawn follows from (seed, step, part of the batch).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..config.training import TrainConfig
from ..data.dataset import Batch
from ..data.pixels import normalize, random_flip
from ..diffusion.ddpm_process import to_device
from .averages import EVERY, PowerFunctionEMA
from .log import TrainingLog
from .losses import training_losses
from .network import local_weights
from .state import Run


def accumulate_gradients(run: Run, network: Callable[..., Any], batches: Iterator[Batch], log: TrainingLog) -> None:
    """Add up the gradients of `gradient_accumulation_steps` batches, each divided by their number.

    Args:
        network: `run.unet`, perhaps compiled.
        batches: this process's part of the images.
    """
    config, accelerator = run.config, run.accelerator
    for micro_step in range(config.gradient_accumulation_steps):
        waiting = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - waiting
        seed_part(config.seed, run.step, micro_step * accelerator.num_processes + accelerator.process_index)
        x_0, labels = augment(batch, config, run.num_classes, accelerator.device)
        with accelerator.accumulate(run.unet):
            losses, t = training_losses(network, run.scheduler.process, x_0, labels, config)
            accelerator.backward(losses.mean())
        log.add_losses(losses, t, waited)


def update_weights(run: Run, log: TrainingLog) -> Tensor:
    """Clip the gradient and step the optimizer, unless the gradient is not finite.

    Returns:
        The norm of the gradient before clipping, a scalar.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = run.plan.learning_rate(run.step)
    grad_norm = run.accelerator.clip_grad_norm_(run.unet.parameters(), run.config.max_grad_norm)
    if isinstance(grad_norm, DTensor):  # of FSDP: each process has a part of it
        grad_norm = grad_norm.full_tensor()
    log.add_gradient(skip_unless_finite(run.optimizer, grad_norm, run.accelerator))
    run.optimizer.step()
    run.optimizer.zero_grad()
    return grad_norm


def update_ema(run: Run) -> None:
    """Move the averages towards the new weights, if the run keeps any."""
    if isinstance(run.ema, PowerFunctionEMA) and (run.step + 1) % EVERY:
        return
    for average in [] if run.ema is None else [run.ema, *run.other_averages]:
        average.step(local_weights(run.unet))


def seed_part(seed: int, step: int, part: int) -> None:
    """Make every random number from here on a function of progress: flips, t, ε, label dropout and dropout.

    Parts of the batch are counted over processes and micro-steps alike, so that two processes draw what one process
    draws that accumulates twice as often.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0]) >> 1)


def augment(
    batch: Batch, config: TrainConfig, num_classes: int | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """x_0 in [-1, 1], (B, C, H, W), randomly flipped with `random_flip`; and labels (B,), some of them dropped.

    A dropped label is `num_classes`, the null label of guidance.
    """
    x_0 = normalize(to_device(batch.pixels, device))
    if config.random_flip:
        x_0 = random_flip(x_0)
    if batch.labels is None or num_classes is None:
        return x_0, None
    labels = to_device(batch.labels, device)
    is_dropped = torch.rand(len(labels), device=device) < config.label_dropout
    return x_0, labels.masked_fill(is_dropped, num_classes)


def skip_unless_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor, accelerator: Accelerator) -> Tensor:
    """Make the next optimizer step do nothing if the gradient is not finite, without waiting for the device.

    The fused AdamW takes such a flag, which is how loss scalers skip overflows; with fp16 the scaler sets it.

    Metal's ignores it (PyTorch's FusedAdamWKernelImpl.mm): there the gradients are dropped, at the price of a wait.

    Returns:
        Whether the gradient is finite, a scalar.
    """
    is_finite = torch.as_tensor(grad_norm, device=accelerator.device).isfinite()
    if accelerator.device.type == "mps":
        if not is_finite:
            optimizer.zero_grad()
    elif accelerator.scaler is None:
        optimizer.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    return is_finite
