"""What the processes of a run share: errors, signals, sums, and work in lockstep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor


class Agreement:
    """Decisions that all processes take together, by a maximum that costs the GPU nothing.

    The collectives of Accelerate run on the GPUs, and would wait there for all work queued before, at every update. So
    the processes have a group of their own, on the CPU.
    """

    def __init__(self, num_processes: int) -> None:
        self.group = dist.new_group(backend="gloo") if num_processes > 1 else None

    def largest(self, value: int) -> int:
        """The largest value of all processes. All of them must call it."""
        if self.group is None:
            return value
        shared = torch.tensor(value)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.group)
        return int(shared)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise a ValueError or OSError of one process in all of them, at the end of this context.

        All of them must enter it, and none may wait for another within.
        """
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        if self.largest(int(failure is not None)):
            raise failure or RuntimeError("another process failed: see its message.")


def sum_over_processes(table: Tensor) -> Tensor:
    """The sum of a float64 table over all processes, on the CPU."""
    state = PartialState()
    if state.device.type == "mps":  # Metal has no float64
        return table
    return reduce(table.to(state.device), "sum").cpu()


def lockstep_batches(count: int, batch_size: int) -> list[Tensor]:
    """The share of one process of `count` items, in batches of indices: of n processes, each takes every n-th item.

    All processes get batches of the same sizes, so that networks whose weights they share stay in step. Indices of
    `count` and above are padding: repeat any item in their place.
    """
    state = PartialState()
    share = torch.arange(math.ceil(count / state.num_processes)) * state.num_processes + state.process_index
    return list(share.split(batch_size))


def gather_lockstep(values: Tensor, count: int) -> Tensor:
    """The values of all `count` items, in order and without the padding, from those of each process's share.

    All processes must call it, and all get the result.
    """
    by_process = gather(values).unflatten(0, (PartialState().num_processes, -1))
    return by_process.transpose(0, 1).flatten(0, 1)[:count]
