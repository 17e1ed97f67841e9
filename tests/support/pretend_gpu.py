"""A GPU in name only: tensors "on cuda" (or "on mps") whose numbers lie on the CPU.

    with PretendGpu() as gpu:
        ...  # code that says device="cuda", as it stands
    gpu.waits  # Counter of (what, "file.py:line")

The paths for GPUs run with the CPU's numbers, so that results can be compared bit for bit, and are watched on the way:

- an operation on tensors of both devices raises `DeviceMix`, as CUDA does;
- whatever makes the CPU wait for the device is counted in `waits`: values that Python reads, blocking copies, uploads
  from memory that is not pinned, shapes that depend on values;
- copies that may be read, or overwritten, before they are done are counted in `unsafe`;
- numbers on the CPU among the operands, which a captured CUDA graph would freeze, are counted in `frozen`;
- more than `memory` bytes at once raise an out-of-memory error;
- on "mps", float64 raises as Metal does, and the fused AdamW ignores `found_inf` (as its Metal kernel does).

Accelerate takes the pretended device for its own. The device is an attribute of a tensor's storage, so views share it.
What a GPU computes differently (rounding, kernels, streams, autocast) is not pretended, nor are generators on it.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU = torch.device("cpu")
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FREE_TO_MIX = {aten.set_, aten.copy_, aten._foreach_copy_}
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray)


class DeviceMix(RuntimeError):
    """What CUDA says of operands on different devices."""


class PretendGpu:
    """The context. `kind` is "cuda" or "mps"; `capability` and `memory` (bytes) are what the device says of itself."""

    def __init__(self, kind: str = "cuda", capability: tuple[int, int] = (9, 0), memory: int = 80 * 2**30) -> None:
        self.device = torch.device(kind, 0)
        self.capability, self.memory = capability, memory
        self.waits, self.unsafe, self.frozen = Counter(), Counter(), Counter()
        self.factories_here = False  # whether operations without operands make tensors on the device
        self.is_watching = True
        self.used = self.peak = 0  # bytes
        self.events = self.reached = 0  # recorded, and known to be over
        self.furthest_ahead = 0  # so many events, at most, the CPU was ahead

    # --- where tensors lie ---

    def place(self, t: Tensor) -> str:
        """ "gpu", "pinned" or "cpu"."""
        if t.device.type != "cpu" or t.layout != torch.strided:  # meta tensors have no storage to speak of
            return "cpu"
        return getattr(t.untyped_storage(), "pretended", "cpu")

    def put(self, t: Tensor, place: str) -> Tensor:
        if place == "gpu" and self.device.type == "mps" and t.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        if t.device.type == "cpu":
            storage = t.untyped_storage()
            if place == "gpu" and getattr(storage, "pretended", None) != "gpu":
                self.allocate(storage)
            storage.pretended = place
        return t

    def allocate(self, storage: torch.UntypedStorage) -> None:
        self.used += storage.nbytes()
        self.peak = max(self.peak, self.used)
        weakref.finalize(storage, self.free, storage.nbytes())
        if self.used > self.memory:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.")

    def free(self, size: int) -> None:
        self.used -= size

    def holds(self, t: object) -> bool:
        with torch._C.DisableTorchFunction():
            return isinstance(t, Tensor) and self.place(t) == "gpu"

    def is_here(self, device: object) -> bool:
        if isinstance(device, int):
            return True
        return device is not None and torch.device(device).type == self.device.type

    # --- what is counted ---

    def note(self, counter: Counter, what: str) -> None:
        if self.is_watching:
            counter[what, _where()] += 1

    def note_copy(self, source: Tensor, to_gpu: bool, non_blocking: bool) -> None:
        """Count what a copy between the devices costs. Only pinned memory reaches a CUDA device without waiting."""
        is_pinned = self.place(source) == "pinned" and self.device.type == "cuda"
        if not to_gpu:
            self.note(self.unsafe if non_blocking else self.waits, "copy to the CPU")
        elif non_blocking and self.device.type == "mps":
            self.note(self.unsafe, "copy to the GPU")
        elif not (non_blocking and is_pinned):
            self.note(self.waits, "copy to the GPU, not pinned" if non_blocking else "copy to the GPU")

    def move(self, t: Tensor, to_gpu: bool, non_blocking: bool) -> Tensor:
        """The tensor on the other device."""
        self.note_copy(t, to_gpu, non_blocking)
        before, self.is_watching = self.is_watching, False
        try:
            copy = t.clone(memory_format=torch.preserve_format)
        finally:
            self.is_watching = before
        return self.put(copy, "gpu" if to_gpu else "cpu")

    def record_event(self) -> SimpleNamespace:
        self.events += 1
        number = self.events
        self.furthest_ahead = max(self.furthest_ahead, self.events - self.reached)
        return SimpleNamespace(synchronize=lambda: setattr(self, "reached", max(self.reached, number)))

    # --- the context ---

    def __enter__(self) -> PretendGpu:
        self._stack = ExitStack()
        self._stack.callback(AcceleratorState._reset_state, True)
        group = torch._C._group_tensors_by_device_and_dtype

        def grouped(lists, with_indices=False):
            here = any(self.holds(t) for t in lists[0])
            groups = group(lists, with_indices)
            return {(self.device if here else device, dtype): g for (device, dtype), g in groups.items()}

        is_cuda = self.device.type == "cuda"
        for module, values in {
            torch._C: {"_group_tensors_by_device_and_dtype": grouped},
            torch.cuda: {
                "is_available": lambda: is_cuda,
                "_lazy_init": lambda: None,
                "synchronize": lambda device=None: self.note(self.waits, "synchronize"),
                "current_stream": lambda device=None: SimpleNamespace(record_event=self.record_event),
                "device_count": lambda: int(is_cuda),
                "current_device": lambda: 0,
                "get_device_name": lambda device=None: "pretended",
                "get_device_capability": lambda device=None: self.capability,
                "get_device_properties": lambda device=None: SimpleNamespace(total_memory=self.memory),
                "is_bf16_supported": lambda including_emulation=True: self.capability >= (8, 0),
            },
            torch.backends.mps: {"is_available": lambda: not is_cuda},
            torch.accelerator: {
                "is_available": lambda: True,
                "current_accelerator": lambda check_available=False: self.device,
            },
            torch.optim.Optimizer: {  # named after CUDA in older releases
                "_accelerator_graph_capture_health_check": lambda optimizer: None,
                "_cuda_graph_capture_health_check": lambda optimizer: None,
            },
        }.items():
            for name, value in values.items():
                self._stack.enter_context(mock.patch.object(module, name, value, create=True))
        AcceleratorState._reset_state(True)
        PartialState(cpu=True)
        PartialState._shared_state["device"] = self.device
        self._stack.enter_context(_Dispatch(self))
        self._stack.enter_context(_Function(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class _Dispatch(TorchDispatchMode):
    """Every operation: hands the device on from operands to results."""

    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, gpu, name = dict(kwargs or {}), self.gpu, func.overloadpacket
        if not gpu.is_watching:
            return func(*args, **kwargs)
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in operands if gpu.place(t) == "gpu"]
        elsewhere = [t for t in operands if gpu.place(t) != "gpu"]
        if here:
            self._check(func, name, args, kwargs, elsewhere)
        if here and gpu.device.type == "mps" and name is aten._fused_adamw_:
            kwargs["found_inf"] = None
        result = func(*args, **kwargs)
        if here or (gpu.factories_here and not elsewhere):
            theirs = {t.untyped_storage()._cdata for t in elsewhere if t.layout == torch.strided}
            for t in tree_leaves(result):
                if isinstance(t, Tensor) and t.untyped_storage()._cdata not in theirs:
                    gpu.put(t, "gpu")
        return result

    def _check(self, func, name, args, kwargs, elsewhere) -> None:
        gpu = self.gpu
        if name is aten.copy_:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            if elsewhere:
                gpu.note_copy(args[1], gpu.holds(args[0]), non_blocking)
        elif name is aten._foreach_copy_:
            if elsewhere:
                gpu.note_copy(args[1][0], gpu.holds(args[0][0]), False)
        elif name in INDEXING and gpu.holds(args[0]):
            indices = [i for i in args[1] if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                gpu.note(gpu.waits, f"{name} by a mask")
            if any(not gpu.holds(i) for i in indices):
                gpu.note(gpu.waits, f"{name} by indices on the CPU")
        elif name not in FREE_TO_MIX and any(t.dim() > 0 for t in elsewhere):
            shapes = ", ".join(str(tuple(t.shape)) for t in elsewhere)
            raise DeviceMix(f"{func}: operands on {gpu.device} and, of shape {shapes}, on the CPU, at {_where()}")
        elif elsewhere and name not in FREE_TO_MIX:
            gpu.note(gpu.frozen, str(name))
        if name in READS:
            gpu.note(gpu.waits, str(name))


class _Function(TorchFunctionMode):
    """Whatever names a device in Python: `device=`, `.device`, `.to`, `.cpu`, `.pin_memory`, …"""

    def __init__(self, gpu: PretendGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, gpu = dict(kwargs or {}), self.gpu
        first = args[0] if args else None
        if isinstance(first, Tensor):
            place = gpu.place(first)
            getter = getattr(func, "__self__", None) if getattr(func, "__name__", "") == "__get__" else None
            if getter is Tensor.device and place == "gpu":
                return gpu.device
            if getter in (Tensor.is_cuda, Tensor.is_mps, Tensor.is_cpu) and place == "gpu":
                return getattr(Tensor, f"is_{gpu.device.type}") is getter
            if func is Tensor.cpu:
                return gpu.move(first, False, False) if place == "gpu" else first
            if func is Tensor.cuda:
                return first if place == "gpu" else gpu.move(first, True, kwargs.get("non_blocking", False))
            if func is Tensor.is_pinned:
                return place == "pinned"
            if func is Tensor.pin_memory:
                if place == "gpu":
                    raise RuntimeError("cannot pin a tensor on a GPU: only dense CPU tensors can be pinned")
                return gpu.put(first.clone(), "pinned")
            if func in (Tensor.numpy, Tensor.__array__) and place == "gpu":
                raise TypeError(f"can't convert {gpu.device} device type tensor to numpy. Use Tensor.cpu() first.")
            if func is Tensor.tolist and place == "gpu":
                gpu.note(gpu.waits, "tolist")
            if func is Tensor.to:
                return self._to(first, list(args[1:]), kwargs)
            if func is torch.as_tensor and "device" in kwargs:
                return self._to(first, [], kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func, args, kwargs):
        """A function that may make tensors: where it is told to, or where its operands lie."""
        gpu, wanted = self.gpu, kwargs.get("device")
        wants_gpu = wanted is not None and gpu.is_here(wanted)
        if wants_gpu:
            kwargs["device"] = CPU
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"Expected a '{gpu.device.type}' device type for generator but found 'cpu'")
        before = gpu.factories_here
        operands = tree_leaves((args, kwargs)) if wanted is None else []
        gpu.factories_here = wants_gpu or any(gpu.holds(t) for t in operands)
        try:
            result = func(*args, **kwargs)
        finally:
            gpu.factories_here = before
        if wants_gpu:
            for t in tree_leaves(result):
                if isinstance(t, Tensor):
                    gpu.put(t, "gpu")
            if func in FROM_PYTHON:
                gpu.note(gpu.waits, "copy to the GPU")
        return result

    def _to(self, t, args, kwargs):
        gpu, device = self.gpu, kwargs.pop("device", None)
        other = kwargs.pop("other", None)
        for value in args:
            if isinstance(value, (str, torch.device)) or (isinstance(value, int) and not isinstance(value, bool)):
                device = value
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
            elif isinstance(value, Tensor):
                other = value
            elif isinstance(value, bool):
                kwargs["non_blocking"] = value
        if other is not None:
            device, kwargs["dtype"] = gpu.device if gpu.holds(other) else CPU, other.dtype
        non_blocking = kwargs.pop("non_blocking", False)
        if device is not None and not gpu.is_here(device) and torch.device(device).type != "cpu":
            return t.to(device=device, **kwargs)  # meta
        if device is not None and gpu.is_here(device) != gpu.holds(t):
            to_gpu = gpu.is_here(device)
            if to_gpu and "dtype" in kwargs:  # converted before it is copied
                t = t.to(kwargs.pop("dtype"))
            t = gpu.move(t, to_gpu, non_blocking)
        return t.to(**kwargs) if kwargs else t


def _where() -> str:
    """The innermost line of ours, else the innermost outside of torch."""
    frame, fallback = sys._getframe(1), "?"
    while frame is not None:
        file = frame.f_code.co_filename
        line = f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        if "/ddpm_hf/" in file:
            return line
        if fallback == "?" and "/torch/" not in file and file != __file__:
            fallback = line
        frame = frame.f_back
    return fallback
