"""The model that a command works with, and the processes that share the work."""

from __future__ import annotations

import atexit
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from ..diffusion.pipeline import DDPMPipelineCustom


def processes() -> PartialState:
    """The processes that a launcher has started, on CPUs too, where Accelerate joins them only if told to."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))  # the first to finish waits for the others
    if state.num_processes > 1:
        atexit.register(state.destroy_process_group)  # else its threads may abort a process that has done its work
    return state


def load_on_device(model: str, revision: str | None, device: str | None, dtype: str = "float32") -> DDPMPipelineCustom:
    """A model on a device, by default the best of this machine, or this process's of several.

    Raises:
        ValueError: where the device can't be used.
    """
    import torch

    from ..storage.loading import load_pipeline

    return load_pipeline(model, revision, getattr(torch, dtype)).to(choose_device(device))


def choose_device(name: str | None) -> torch.device | str:
    """The device of this name, by default the best of this machine, or this process's of several.

    Raises:
        ValueError: where the device can't be used.
    """
    return _device(name) if name else processes().device


def _device(name: str) -> str:
    """The name of a device, if it can hold a tensor."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` is {name!r}, which can't be used here ({reason}): try --device cpu.") from error
    return name
