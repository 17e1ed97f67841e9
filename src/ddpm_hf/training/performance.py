"""How the network is computed: its precision, its memory format, and whether it is compiled.

The limits for CPUs are measured (training/benchmarks/README.md); those for GPUs come from documentation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env

from ..config.training import TrainConfig
from ..sampling.fast import is_bfloat16_faster, missing_for_compilation
from .network import build_unet

CHANNELS_LAST_PARAMETERS = 10_000_000  # on a CPU: in smaller networks, normalisation loses what convolution gains
COMPILED_UPDATES = 5_000  # on a GPU: compilation takes a minute or two


class Choice(NamedTuple):
    """The value of an option, and why it was chosen."""

    value: str | None
    reason: str = "as requested"


class Performance(NamedTuple):
    """How the network is computed in training, and a note on what `auto` has chosen."""

    channels_last: bool
    compiled: bool
    notes: list[str]
    is_unusual: bool = False  # neither 32 bits, nor the usual memory format, nor without compilation


def settle_precision(config: TrainConfig) -> Choice:
    """The precision to train in, from the options and the machine alone; None leaves it to `accelerate launch`."""
    if config.mixed_precision != "auto":
        return Choice(config.mixed_precision)
    with torch.device("meta"):
        unet = build_unet(config, 1 if config.label_column else None)
    return choose_precision(expected_device(), unet.num_parameters())


def choose_performance(
    config: TrainConfig, precision: Choice, accelerator: Accelerator, num_parameters: int, updates: int
) -> Performance:
    """Memory format and compilation, for a run of this many updates.

    Args:
        precision: what `settle_precision` chose, for the note.

    Raises:
        ValueError: for channels last with FSDP, and for `compile` "yes" where something that it needs is missing.
    """
    choices = {"mixed_precision": precision}
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    if is_sharded and config.channels_last == "yes":
        raise ValueError("`channels_last` is 'yes', but FSDP shards contiguous weights only: use no or auto.")
    if config.channels_last != "auto":
        choices["channels_last"] = Choice(config.channels_last)
    elif is_sharded:
        choices["channels_last"] = Choice("no", "because FSDP shards contiguous weights only")
    else:
        choices["channels_last"] = choose_channels_last(accelerator.mixed_precision, accelerator.device, num_parameters)
    missing = missing_for_compilation(accelerator.device)
    if config.compile == "yes" and missing:
        raise ValueError(f"`compile` is 'yes', but torch.compile needs {missing}: install it, or use auto or no.")
    if config.compile != "auto":
        choices["compile"] = Choice(config.compile)
    elif is_sharded:
        choices["compile"] = Choice("no", "because FSDP and torch.compile have not been measured together")
    else:
        choices["compile"] = choose_compile(accelerator.device, updates)
    chosen = [f"{name} {value}, {why}" for name, (value, why) in choices.items() if getattr(config, name) == "auto"]
    notes = [f"Chosen: {'; '.join(chosen)}."] if chosen else []
    channels_last, compiled = (choices[name].value == "yes" for name in ("channels_last", "compile"))
    is_unusual = channels_last or compiled or accelerator.mixed_precision != "no"
    return Performance(channels_last, compiled, notes, is_unusual)


def choose_precision(device: torch.device, num_parameters: int) -> Choice:
    """`--mixed_precision auto`: bf16 where it is faster, and never fp16."""
    is_faster, reason = is_bfloat16_faster(device, num_parameters)
    if device.type == "cuda" and not is_faster:
        reason += ", and float16 may overflow"
    return Choice("bf16" if is_faster else "no", f"because {reason}")


def choose_channels_last(precision: str, device: torch.device, num_parameters: int) -> Choice:
    """`--channels_last auto`: yes where convolutions in half precision are most of the work."""
    if precision == "no":
        return Choice("no", "because it pays off in half precision only")
    if device.type == "cuda":
        return Choice("no", "because on a GPU group normalization undoes it, and a gain has not been measured")
    if num_parameters < CHANNELS_LAST_PARAMETERS:
        limit = f"{CHANNELS_LAST_PARAMETERS:,}"
        return Choice("no", f"because below {limit} parameters it costs more than it gains on a CPU")
    return Choice("yes", "the layout of bf16 convolutions on a CPU")


def choose_compile(device: torch.device, updates: int) -> Choice:
    """`--compile auto`: yes where the run is long enough to earn back the time of the compilation."""
    if device.type != "cuda":
        return Choice("no", "because it gains a sixth at most on a CPU")
    missing = missing_for_compilation(device)
    if missing:
        return Choice("no", f"because torch.compile needs {missing}")
    if updates < COMPILED_UPDATES:
        return Choice("no", f"because fewer than {COMPILED_UPDATES:,} updates do not earn it back")
    return Choice("yes", f"which {updates:,} updates earn back")


def expected_device() -> torch.device:
    """The device that Accelerate will choose. Asking it would start its process group, without our time limit."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
