"""What the processes of a run share: errors, signals, sums, and work in lockstep."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor

T = TypeVar("T")

# A process that is lost without closing its connections (its machine lost power) is noticed after this time.
TIMEOUT = timedelta(minutes=30)
PATIENCE = timedelta(days=1)  # the same before training, where a machine may download and decode while others wait


class Agreement:
    """What the processes of a run tell each other. All of them must call a method.

    The collectives of Accelerate run on the GPUs, and would wait there for all work queued before, at every update. So
    the processes have groups of their own, on the CPU. Where another process has ended or can't be reached, methods
    raise a ConnectionError.
    """

    def __init__(self, num_processes: int) -> None:
        several = num_processes > 1
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if several else None
        self._patient_group = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def largest(self, value: int) -> int:
        """The largest value of all processes."""
        if self._group is None:
            return value
        shared = torch.tensor(value)
        with lost_processes_raise():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return int(shared)

    def largest_of_each(self, *values: float) -> list[float]:
        """The largest first value of all processes, the largest second one, and so on: in one message."""
        if self._group is None:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        with lost_processes_raise():
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._group)
        return shared.tolist()

    def gather(self, value: T, patiently: bool = False) -> list[T]:
        """The values of all processes, by rank. `patiently` waits for a day instead of half an hour."""
        group = self._patient_group if patiently else self._group
        if group is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(group)
        with lost_processes_raise():
            dist.all_gather_object(values, value, group=group)
        return values

    def from_main(self, value: T) -> T:
        """The value of the main process, whose disk the others may not see."""
        if self._group is None:
            return value
        values = [value]
        with lost_processes_raise():
            dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def tensors_from_main(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The tensors of the main process, on the CPU; what the others pass is ignored."""
        if self._group is None:
            return tensors or {}
        is_main = dist.get_rank() == 0
        shapes = self.from_main({name: (t.shape, t.dtype) for name, t in (tensors or {}).items()})
        received = tensors if is_main and tensors else {n: torch.empty(s, dtype=d) for n, (s, d) in shapes.items()}
        with lost_processes_raise():
            for tensor in received.values():
                dist.broadcast(tensor, 0, group=self._group)
        return received

    def check_same(self, what: Mapping[str, Any], remedy: str) -> None:
        """Raise a ValueError in all processes, with the values by rank, unless all have the same values."""
        gathered = self.gather((socket.gethostname(), {name: str(value) for name, value in what.items()}))
        for name in what:
            owners: dict[str, list[str]] = {}
            for rank, (host, values) in enumerate(gathered):
                owners.setdefault(values[name], []).append(f"rank {rank} ({host})")
            if len(owners) > 1:
                found = "; ".join(f"{value} in {', '.join(ranks)}" for value, ranks in owners.items())
                raise ValueError(f"the processes of this run differ in {name}: {found}. {remedy}")

    @contextmanager
    def together(self, patiently: bool = False) -> Iterator[None]:
        """Raise a ValueError or OSError of one process in all of them, at the end of this context.

        All of them must enter it, and none may wait for another within. `patiently` waits for the slowest one for a day
        instead of half an hour.
        """
        failure: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        failed = None if failure is None else (isinstance(failure, ValueError), str(failure))
        failures = enumerate(self.gather(failed, patiently))
        if failure is not None:
            raise failure
        for rank, of_other in failures:
            if of_other is not None:
                is_value_error, message = of_other
                raise (ValueError if is_value_error else OSError)(f"process {rank} failed: {message}")


@contextmanager
def lost_processes_raise() -> Iterator[None]:
    """Within this context, an error of gloo or NCCL is raised as a ConnectionError that says what it usually means."""
    try:
        yield
    except RuntimeError as error:  # gloo raises nothing narrower
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = str(error).splitlines()[0].rpartition("] ")[2]
            raise ConnectionError(f"another process of this run has ended, or can't be reached ({reason})") from error
        raise


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
