"""How a network samples fastest on this machine: by PyTorch or onnxruntime, in which precision, and whether compiled.

The limits for CPUs are measured (training/benchmarks/README.md); what is said of GPUs is from their documentation.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from diffusers import UNet2DModel

from ..diffusion.ddpm_fast_network import FastNetwork
from ..diffusion.ddpm_process import check_integer
from ..diffusion.pipeline import image_size
from .onnx_network import OnnxNetwork, missing_packages

# Below, a CPU spends more on converting activations than it gains in multiplications.
BFLOAT16_PARAMETERS = 2_000_000
# What compiling takes, and the least part of a network call that it saves, by device.
COMPILATION_SECONDS = {"cpu": 90, "cuda": 60}
COMPILED_SAVING = 0.25
# On a CPU, only what a small network does beside its multiplications is worth compiling.
COMPILED_PARAMETERS = {"cpu": 5_000_000, "cuda": float("inf")}
LEAST_GAIN = 1.05  # else nothing is changed
# What making an onnxruntime session takes, and the least part of a network call that it saves.
ONNX_SECONDS, ONNX_SECONDS_PER_PARAMETER = 1.0, 1e-7
ONNX_SAVING = 0.25
TRITON_CAPABILITY = (7, 0)  # of the oldest GPUs that Triton generates code for
# Measuring what could be saved takes three calls, too many of a job of fewer calls than these.
MEASURED_CALLS = 100


def fast_network(
    unet: UNet2DModel, num_images: int, num_inference_steps: int, batch_size: int | None, guidance_scale: float
) -> tuple[FastNetwork | OnnxNetwork | None, str]:
    """The fastest twin of a network for a job of this size: see `DDPMPipelineCustom.enable_fast_sampling`.

    Returns:
        The twin, or None where nothing is faster than the network itself; and what was chosen and why, in a line.

    Raises:
        ValueError: for a bad argument, or where the network is offloaded or cast layer by layer.
    """
    batch_size = num_images if batch_size is None else batch_size
    sizes = {"num_images": num_images, "batch_size": batch_size, "num_inference_steps": num_inference_steps}
    for name, value in sizes.items():
        check_integer(name, value, 1)
    image_size(unet)  # raises unless it is known
    dtype, precision = sampling_dtype(unet)
    twin = FastNetwork(unet, dtype)
    is_guided = unet.config.num_class_embeds is not None and guidance_scale != 1
    num_calls, rows = num_inference_steps * (num_images // batch_size), batch_size * (2 if is_guided else 1)
    if num_calls < MEASURED_CALLS:
        best: FastNetwork | OnnxNetwork | None = twin if dtype != torch.float32 else None
        return best, f"{precision}; not compiled ({num_calls} network calls are too few)"
    seconds = seconds_per_call(twin, unet, rows)
    onnx, onnx_seconds, runtime = _onnx_where_it_pays(unet, rows, num_calls, seconds)
    is_compiled, compilation = _compile_where_it_pays(twin, unet, rows, num_calls, onnx_seconds)
    if onnx is not None and not is_compiled:
        return onnx, f"{runtime}; {compilation}"
    best = twin if is_compiled or dtype != torch.float32 else None
    return best, "; ".join(filter(None, [precision, runtime, compilation]))


def sampling_dtype(unet: UNet2DModel) -> tuple[torch.dtype, str]:
    """The dtype that a network samples fastest in, and why. A GPU without bfloat16 takes float16."""
    if unet.dtype != torch.float32:
        return unet.dtype, f"{_name(unet.dtype)}, as it was loaded"
    is_faster, reason = is_bfloat16_faster(unet.device, unet.num_parameters())
    if not is_faster and unet.device.type != "cuda":
        return torch.float32, f"float32, because {reason}"
    dtype = torch.bfloat16 if is_faster else torch.float16
    layout = ", channels last" if unet.device.type == "cpu" else ""
    return dtype, f"{_name(dtype)}{layout}, because {reason}"


def is_bfloat16_faster(device: torch.device, num_parameters: int) -> tuple[bool, str]:
    """Whether a device computes a network faster in bfloat16 than in float32, and why."""
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        return is_native, f"this GPU {'computes in' if is_native else 'lacks'} bfloat16"
    if device.type != "cpu" or not cpu_has_bfloat16():
        return False, f"this {device.type} has no bfloat16 instructions"
    if num_parameters < BFLOAT16_PARAMETERS:
        return False, f"below {BFLOAT16_PARAMETERS:,} parameters bfloat16 gains little on a CPU"
    return True, "this CPU has bfloat16 instructions"


def cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16: else it computes in float32 and converts."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
    return any(check is not None and check() for check in checks)


def missing_for_compilation(device: torch.device) -> str | None:
    """What torch.compile needs to generate code for a device and does not find; None where nothing is missing."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < TRITON_CAPABILITY:
            return "a GPU of compute capability {}.{}; this one has {}.{}".format(*TRITON_CAPABILITY, *capability)
        if find_spec("triton") is None:
            return "Triton"
    compilers = ("CC", "cc", "gcc", "clang") if device.type == "cuda" else ("CXX", "c++", "g++", "clang++")
    if os.name == "posix" and not any(shutil.which(os.environ.get(name, name)) for name in compilers):
        return "a C compiler" if device.type == "cuda" else "a C++ compiler"
    return None


def _onnx_where_it_pays(
    unet: UNet2DModel, batch_size: int, num_calls: int, seconds: float
) -> tuple[OnnxNetwork | None, float, str]:
    """The network in onnxruntime, if that is faster than a twin that takes `seconds` per call, by trial.

    Returns:
        It, or None; the seconds of the faster of both; and what was found, nothing where there is no onnxruntime.
    """
    if unet.device.type != "cpu" or unet.dtype != torch.float32 or missing_packages():
        return None, seconds, ""
    cost = ONNX_SECONDS + ONNX_SECONDS_PER_PARAMETER * unet.num_parameters()
    saved = num_calls * seconds * ONNX_SAVING
    if saved < 2 * cost:
        return None, seconds, f"without onnxruntime (about {cost:.0f} s, to save {saved:.1f} s)"
    try:
        network = OnnxNetwork(unet)
        onnx_seconds = seconds_per_call(network, unet, batch_size)
    except Exception as error:  # whatever exporters and runtimes raise
        reason, *_ = str(error).strip().splitlines() or ["without a message"]
        return None, seconds, f"without onnxruntime ({type(error).__name__}: {reason})"
    gain = f"{seconds / onnx_seconds:.2f} times as fast as PyTorch"
    if onnx_seconds * LEAST_GAIN > seconds:
        return None, seconds, f"without onnxruntime (tried: {gain})"
    return network, onnx_seconds, f"float32 by onnxruntime ({gain})"


def _compile_where_it_pays(
    twin: FastNetwork, unet: UNet2DModel, batch_size: int, num_calls: int, seconds: float
) -> tuple[bool, str]:
    """Compile the twin if that saves more time than it takes, by trial; whether it is compiled, and why.

    Args:
        seconds: of a call of the fastest alternative.
    """
    kind, parameters = unet.device.type, unet.num_parameters()
    if kind not in COMPILATION_SECONDS or parameters > COMPILED_PARAMETERS[kind]:
        return False, "not compiled (no gain for such a network on this device)"
    missing = missing_for_compilation(unet.device)
    if missing:
        return False, f"not compiled (torch.compile needs {missing})"
    cost = COMPILATION_SECONDS[kind]
    saved = num_calls * seconds * COMPILED_SAVING
    if saved < 2 * cost:
        return False, f"not compiled (about {cost} s, to save {saved:.0f} s of {num_calls} network calls)"
    try:
        twin.compile(batch_size)
        gain = seconds / seconds_per_call(twin, unet, batch_size)
        outcome = f"tried: {gain:.2f} times as fast"
    except Exception as error:  # whatever compilers raise
        reason, *_ = str(error).strip().splitlines() or ["without a message"]
        gain, outcome = 0.0, f"{type(error).__name__}: {reason}"
    if gain > LEAST_GAIN:
        return True, f"compiled for batches of {batch_size} ({gain:.2f} times as fast)"
    twin.undo_compile()
    return False, f"not compiled ({outcome})"


def seconds_per_call(twin: FastNetwork | OnnxNetwork, unet: UNet2DModel, batch_size: int) -> float:
    """Of the faster of two calls of a network's twin, after one that allocates or compiles."""
    config, device = unet.config, unet.device
    x = torch.zeros(batch_size, config.in_channels, *image_size(unet), device=device)
    t = torch.zeros((), dtype=torch.long, device=device)
    labels = torch.zeros(batch_size, dtype=torch.long, device=device) if config.num_class_embeds else None
    twin(x, t, labels)
    return min(_seconds(lambda: twin(x, t, labels), device) for _ in range(2))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
