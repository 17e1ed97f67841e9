"""How the network is computed: in which precision, in which order in memory, and whether compiled.

The limits for CPUs are measured (training/benchmarks/README.md); what is said of GPUs is from their documentation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env

from ..config.training import TrainConfig
from ..sampling.fast import is_bfloat16_faster
from .network import build_unet

CHANNELS_LAST_PARAMETERS = 10_000_000  # on a CPU: in smaller networks, normalisation loses what convolution gains
COMPILED_UPDATES = 5_000  # on a GPU: compilation takes a minute or two


class Choice(NamedTuple):
    """The value of an option, and why it was chosen."""

    value: str | None
    reason: str = "as requested"


class Performance(NamedTuple):
    """How the network is computed in training, and a note on what was left to us."""

    channels_last: bool
    compiled: bool
    notes: list[str]


def settle_precision(config: TrainConfig) -> Choice:
    """The precision to train in, from the options and the machine alone; None leaves it to `accelerate launch`."""
    if config.mixed_precision != "auto":
        return Choice(config.mixed_precision)
    with torch.device("meta"):
        unet = build_unet(config, 1 if config.label_column else None)
    return choose_precision(_device(), unet.num_parameters())


def choose_performance(
    config: TrainConfig, precision: Choice, accelerator: Accelerator, num_parameters: int, updates: int
) -> Performance:
    """The rest of it, for a run of so many updates.

    Raises:
        ValueError: for channels last with FSDP.
    """
    channels_last, compiled = Choice(config.channels_last), Choice(config.compile)
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    if is_sharded and config.channels_last == "yes":
        raise ValueError("`channels_last` is 'yes', but FSDP shards contiguous weights only: use no or auto.")
    if config.channels_last == "auto":
        channels_last = (
            Choice("no", "because FSDP shards contiguous weights only")
            if is_sharded
            else choose_channels_last(accelerator.mixed_precision, accelerator.device, num_parameters)
        )
    if config.compile == "auto":
        compiled = choose_compile(accelerator.device, updates)
    chosen = [
        f"{name} {choice.value}, {choice.reason}"
        for name, choice in (("mixed_precision", precision), ("channels_last", channels_last), ("compile", compiled))
        if getattr(config, name) == "auto"
    ]
    notes = [f"Chosen: {'; '.join(chosen)}."] if chosen else []
    return Performance(channels_last.value == "yes", compiled.value == "yes", notes)


def choose_precision(device: torch.device, num_parameters: int) -> Choice:
    """What `--mixed_precision auto` means: bf16 where it is faster, and never fp16."""
    is_faster, reason = is_bfloat16_faster(device, num_parameters)
    if device.type == "cuda" and not is_faster:
        reason += ", and float16 may overflow"
    return Choice("bf16" if is_faster else "no", f"because {reason}")


def choose_channels_last(precision: str, device: torch.device, num_parameters: int) -> Choice:
    """What `--channels_last auto` means: yes where convolutions in half precision are most of the work."""
    if precision == "no":
        return Choice("no", "because it pays in half precision only")
    if device.type == "cuda":
        return Choice("yes", "as tensor cores want it")
    if num_parameters < CHANNELS_LAST_PARAMETERS:
        return Choice(
            "no", f"because below {CHANNELS_LAST_PARAMETERS:,} parameters it costs more than it gains on a CPU"
        )
    return Choice("yes", "as bf16 convolutions of a CPU want it")


def choose_compile(device: torch.device, updates: int) -> Choice:
    """What `--compile auto` means: yes where so many updates earn back the time that compilation takes."""
    if device.type != "cuda":
        return Choice("no", "because it gains a sixth at most on a CPU")
    if updates < COMPILED_UPDATES:
        return Choice("no", f"because less than {COMPILED_UPDATES:,} updates do not earn it back")
    return Choice("yes", f"which {updates:,} updates earn back")


def _device() -> torch.device:
    """The kind of device that Accelerate will choose; to ask it would start its processes, without our time limit."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
