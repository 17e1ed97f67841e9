"""A network's twin that samples faster: half precision, memory layout and compilation, each where it pays.

The network itself stays as it is, and so does what is saved of it. The trajectory stays float32: only the network's own
arithmetic changes. What is chosen depends on the device, the network and the length of the job; compilation, which
changes outputs by no more than rounding, depends on measured times, too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from diffusers import UNet2DModel
from torch import Tensor

# Below, a CPU spends more on converting activations than it gains in multiplications.
HALF_PRECISION_PARAMETERS = 2_000_000
# What compiling takes, and the least part of a network call that it saves, by device.
COMPILATION_SECONDS = {"cpu": 90, "cuda": 60}
COMPILED_SAVING = 0.25
# On a CPU, only what a small network does beside its multiplications is worth compiling.
COMPILED_PARAMETERS = {"cpu": 5_000_000, "cuda": float("inf")}
LEAST_COMPILED_GAIN = 1.05  # else the twin stays as it was
# Measuring what compilation would save takes three calls, too many of a job of fewer calls than these.
MEASURED_CALLS = 100


class FastNetwork:
    """The twin of a network, called as the network is, for inference alone and by one thread alone.

    Args:
        unet: the network. It is copied; when its weights change, `is_twin_of` tells.
        batch_size: B, the images of a call, those for guidance included. Other batches work, uncompiled.
        num_calls: how many such calls are to come. Compilation takes about a minute and must earn it back.

    Attributes:
        dtype: of the weights and activations.
        description: what was chosen and why, for people.
    """

    def __init__(self, unet: UNet2DModel, batch_size: int, num_calls: int) -> None:
        self.batch_size, self._weights = batch_size, _state_of(unet)
        self.dtype, why = _choose_dtype(unet)
        self._network = copy.deepcopy(unet).eval().requires_grad_(False)
        if self.dtype != torch.float32:
            # Not the `to` of diffusers, which warns of layers to be kept in float32 where there are none.
            torch.nn.Module.to(self._network, self.dtype).to(memory_format=torch.channels_last)
        self._compiled: Callable[..., tuple[Tensor]] | None = None
        self.description = f"{why}; {self._compile_where_it_pays(num_calls)}"

    @torch.no_grad()  # inference mode would make tensors of another kind, for which it would be compiled again
    def __call__(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, return_dict: bool = False
    ) -> tuple[Tensor]:
        """The prediction (B, C, H, W), in the dtype of the network, for x of any floating dtype and its timestep."""
        x = x.to(self.dtype)
        if self._compiled is None or len(x) != self.batch_size:
            return self._network(x, t, class_labels=class_labels, return_dict=False)
        torch.compiler.cudagraph_mark_step_begin()  # the output of the last call may be overwritten
        return self._compiled(x, t, class_labels=class_labels, return_dict=False)

    @property
    def is_faster(self) -> bool:
        """Whether it differs from the network at all."""
        return self.dtype != torch.float32 or self._compiled is not None

    def is_twin_of(self, unet: UNet2DModel) -> bool:
        """Whether the network still has the weights, in the place, that this one was made from."""
        return self._weights == _state_of(unet)

    def _compile_where_it_pays(self, num_calls: int) -> str:
        device, parameters = self._network.device, self._network.num_parameters()
        if device.type not in COMPILATION_SECONDS or parameters > COMPILED_PARAMETERS[device.type]:
            return "not compiled (no gain for such a network on this device)"
        cost = COMPILATION_SECONDS[device.type]
        if num_calls < MEASURED_CALLS:
            return f"not compiled ({num_calls} network calls are too few)"
        seconds = self._seconds_per_call()
        saved = num_calls * seconds * COMPILED_SAVING
        if saved < 2 * cost:
            return f"not compiled (about {cost} s, to save {saved:.0f} s of {num_calls} network calls)"
        gain, failure = self._compile(seconds)
        if gain > LEAST_COMPILED_GAIN:
            return f"compiled for batches of {self.batch_size} ({gain:.2f} times as fast)"
        self._compiled = None
        if self.dtype == torch.float32:
            self._network.to(memory_format=torch.contiguous_format)
        return f"not compiled ({failure or f'tried: {gain:.2f} times as fast'})"

    def _compile(self, seconds: float) -> tuple[float, str]:
        """How many times as fast as before the compiled network is; 0 and the error where there is no compiler."""
        self._network.to(memory_format=torch.channels_last)  # compiled, it pays in float32 too
        mode = "reduce-overhead" if self._network.device.type == "cuda" else None  # CUDA graphs, with static buffers
        try:
            self._compiled = torch.compile(self._network, fullgraph=True, dynamic=False, mode=mode)
            return seconds / self._seconds_per_call(), ""
        except Exception as error:  # whatever compilers raise
            reason, *_ = str(error).strip().splitlines() or ["without a message"]
            return 0.0, f"{type(error).__name__}: {reason}"

    def _seconds_per_call(self) -> float:
        """Of the faster of two calls, after one that allocates or compiles."""
        config, device = self._network.config, self._network.device
        size = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
        x = torch.zeros(self.batch_size, config.in_channels, *size, device=device)
        t = torch.zeros((), dtype=torch.long, device=device)
        labels = torch.zeros(self.batch_size, dtype=torch.long, device=device) if config.num_class_embeds else None
        self(x, t, labels)
        return min(_seconds(lambda: self(x, t, labels), device) for _ in range(2))


def _choose_dtype(unet: UNet2DModel) -> tuple[torch.dtype, str]:
    """The dtype that the network is fastest in, and why."""
    if unet.dtype != torch.float32:
        return unet.dtype, f"{_name(unet.dtype)}, as it was loaded"
    if unet.device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return dtype, f"{_name(dtype)}, channels last"
    millions = f"{unet.num_parameters() / 1e6:.1f} M parameters"
    if unet.device.type != "cpu" or unet.num_parameters() < HALF_PRECISION_PARAMETERS:
        return torch.float32, f"float32 ({millions})"
    if not cpu_has_bfloat16():
        return torch.float32, "float32 (this CPU has no bfloat16 instructions)"
    return torch.bfloat16, f"bfloat16, channels last ({millions})"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16: else it computes in float32 and converts."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(check is not None and check() for check in checks)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _state_of(unet: UNet2DModel) -> tuple[object, ...]:
    """What changes when weights are moved, converted, replaced or written to."""
    norms = torch.stack([p.detach().float().norm() for p in unet.parameters()]).tolist()
    return tuple((p.data_ptr(), p.dtype, norm) for p, norm in zip(unet.parameters(), norms, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
