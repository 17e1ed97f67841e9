"""How many images are trained on at once: as many as the memory holds, and what to lower where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, find_executable_batch_size
from accelerate.utils.memory import clear_device_cache

from ..config.training import PAPER_BATCH_SIZE, TrainConfig
from ..diffusion.ddpm_process import DDPMProcess
from ..distributed import Agreement
from .losses import training_losses
from .network import build_optimizer, build_unet

HEADROOM = 0.05  # of a GPU's memory, for fragments, and what libraries take later


def settle_batch_size(
    config: TrainConfig,
    accelerator: Accelerator,
    agreement: Agreement,
    process: DDPMProcess,
    num_classes: int | None,
    progress: dict[str, Any],
) -> tuple[TrainConfig, list[str]]:
    """The configuration with numbers for `train_batch_size` and `gradient_accumulation_steps`, and notes for the user.

    All processes must call it, and all get the same numbers.

    Args:
        progress: of the checkpoint to resume from, whose batch size is kept, or empty.

    Raises:
        ValueError: where the global batch can't be divided like that, or `auto` can't be measured.
    """
    is_auto, processes = config.train_batch_size == "auto", accelerator.num_processes
    images = config.global_batch_size or (PAPER_BATCH_SIZE if is_auto else None)
    if images is None:
        return config, []
    share, rest = divmod(images, processes)
    if rest:
        raise ValueError(
            f"`global_batch_size` is {images}, but must be a multiple of the {processes} processes: pass "
            f"--global_batch_size {(share + 1) * processes}."
        )
    notes = []
    if is_auto:
        before = progress.get("config", {}).get("train_batch_size", 0)
        is_kept = before and share % before == 0
        size = before if is_kept else _largest_batch_size(config, accelerator, agreement, process, num_classes, share)
        origin = "as before" if is_kept else "the most that fits"
        notes.append(f"train_batch_size {size}, {origin}; {share // size} of them per update and process.")
    else:
        size = config.batch_size
        if share % size:
            raise ValueError(
                f"`global_batch_size` is {images}, but {processes} × `train_batch_size` {size} does not divide it: "
                f"pass --train_batch_size {_divisors(share, size)[0]}, or leave --global_batch_size out."
            )
    accumulation = share // size
    if config.gradient_accumulation_steps not in (1, accumulation):
        raise ValueError(
            f"`gradient_accumulation_steps` is {config.gradient_accumulation_steps}, but `global_batch_size` {images} "
            f"takes {accumulation}: leave one of them out."
        )
    accelerator.gradient_accumulation_steps = accumulation
    numbers = {"train_batch_size": size, "gradient_accumulation_steps": accumulation, "global_batch_size": images}
    return replace(config, **numbers), notes


def what_to_lower(config: TrainConfig) -> str:
    """The remedy for a batch that does not fit the memory of a device."""
    saving = "" if config.gradient_checkpointing else "add --gradient_checkpointing, or "
    return (
        f"`train_batch_size` is {config.train_batch_size}: {saving}lower it, and pass --global_batch_size to keep the "
        "images per update; --train_batch_size auto finds the most that fits. Then continue with "
        "--resume_from_checkpoint latest."
    )


def _largest_batch_size(
    config: TrainConfig,
    accelerator: Accelerator,
    agreement: Agreement,
    process: DDPMProcess,
    num_classes: int | None,
    share: int,
) -> int:
    """The largest divisor of a process's share of the images of an update that fits the memory of every process."""
    if accelerator.device.type == "cpu":
        raise ValueError("`train_batch_size` is 'auto', which is measured on a GPU; this is a CPU: pass a number.")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("`train_batch_size` is 'auto', which can't be measured before FSDP shards: pass a number.")
    first, *others = _divisors(share, share)
    remaining = iter(others)

    def attempt(batch_size: int) -> int:
        _try_update(config, accelerator, process, num_classes, batch_size)
        return batch_size

    search = find_executable_batch_size(attempt, first, lambda: next(remaining, 0))
    with agreement.together():
        try:
            size = search()
        except RuntimeError as error:  # at zero
            if "No executable batch size" not in str(error):
                raise
            raise ValueError(
                "not even one image at a time fits the memory of this GPU: add --gradient_checkpointing, or use a "
                "smaller network or resolution."
            ) from error
    clear_device_cache(garbage_collection=True)
    return -agreement.largest(-size)


def _try_update(
    config: TrainConfig, accelerator: Accelerator, process: DDPMProcess, num_classes: int | None, batch_size: int
) -> None:
    """Two updates of a network that is then forgotten, beside as much memory as a run holds."""
    device = accelerator.device
    unet = build_unet(config, num_classes).to(device).train()
    optimizer = build_optimizer(config, unet)
    copies = int(config.use_ema) + int(accelerator.num_processes > 1)  # the moving average; DDP's buckets
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    held = torch.empty(copies * 4 * unet.num_parameters() + int(HEADROOM * memory), dtype=torch.uint8, device=device)
    size = (batch_size, unet.config.in_channels, config.resolution, config.resolution)
    labels = None if num_classes is None else torch.zeros(batch_size, dtype=torch.long, device=device)
    for _ in range(2):  # the second beside the optimizer's moments
        with accelerator.autocast():
            losses, _ = training_losses(unet, process, torch.randn(size, device=device), labels, config)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    del held


def _divisors(number: int, limit: int) -> list[int]:
    """The divisors of a number up to a limit, descending."""
    return [n for n in range(limit, 0, -1) if number % n == 0]
