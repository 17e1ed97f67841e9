"""Arithmetic that a decoder must repeat to the last bit: how it is fixed, described and tried first."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..diffusion.ddpm_process import to_device
from ..sampling.generate import eval_mode

# Environment variables by which PyTorch, oneDNN and MKL choose among the instructions of a processor.
CHOICES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")


@contextmanager
def repeatable_arithmetic(network: UNet2DModel) -> Iterator[None]:
    """Within this context a network's outputs depend on its inputs, this machine's kind and its libraries alone.

    The CPU computes with one thread: with several, the order of sums depends on their number, and with some libraries
    on the machine's load. On a GPU, algorithms are the deterministic ones, and none is chosen by its speed.
    """
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32)
    torch.set_num_threads(1)
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with eval_mode(network), torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = before[:2]
        torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32 = before[2:]


def describe_arithmetic(network: UNet2DModel) -> dict[str, str]:
    """What the outputs of a network may depend on, next to its weights."""
    device = network.device
    on_cpu = device.type == "cpu"
    return {
        "torch": torch.__version__,
        "device": device.type if on_cpu else f"{device.type} {_accelerator_name(device)}",
        "dtype": str(network.dtype).removeprefix("torch."),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}" if on_cpu else "",
        "oneDNN": str(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) if on_cpu else "",
        "system": platform.system(),
        "environment": " ".join(f"{name}={os.environ[name]}" for name in CHOICES if name in os.environ),
    }


def probe(
    network: UNet2DModel, shape: Sequence[int], timesteps: Sequence[int], batch_sizes: Sequence[int],
    class_label: int | None = None,
) -> str:  # fmt: skip
    """Sixteen hexadecimal digits of a network's outputs at fixed inputs, one call for each of the sizes of batches.

    To be called within `repeatable_arithmetic`.

    Args:
        shape: (C, H, W).
        timesteps: from which each call takes one.
    """
    digest = hashlib.sha256()
    for i, size in enumerate(sorted(set(batch_sizes))):
        noise = np.frombuffer(hashlib.shake_128(b"probe").digest(size * int(np.prod(shape))), np.uint8)
        x = torch.from_numpy(noise.reshape(size, *shape) / np.float32(64) - np.float32(2))
        t = timesteps[i * (len(timesteps) - 1) // max(len(set(batch_sizes)) - 1, 1)]
        digest.update(predict(network, x, t, class_label).numpy().tobytes())
    return digest.hexdigest()[:16]


def predict(network: UNet2DModel, x_t: Tensor, t: int, class_label: int | None = None) -> Tensor:
    """The network's output at x_t, float32 (B, C, H, W), all images at one t; float32 on the CPU.

    Raises:
        ValueError: if it is not finite.
    """
    device = network.device
    labels = None if class_label is None else torch.full((len(x_t),), class_label, device=device)
    x = to_device(x_t, device).to(network.dtype)
    output: Tensor = network(x, torch.tensor(t, device=device), class_labels=labels, return_dict=False)[0]
    output = output.float().cpu()
    if not output.isfinite().all():
        raise ValueError(f"the network's prediction at t = {t} holds NaN or infinity: it is damaged, or needs float32.")
    return output


def check_arithmetic(stored: dict[str, Any], network: UNet2DModel, found_probe: str) -> None:
    """Compare this machine's arithmetic with that of a file.

    Args:
        stored: from the file: `describe_arithmetic`, and the `probe`.

    Raises:
        ValueError: if outputs differ: names what else differs, and what would work.
    """
    if found_probe == stored.get("probe"):
        return
    here = describe_arithmetic(network)
    differences = [
        f"{key} is {value!r} here and {stored.get(key)!r} in the file"
        for key, value in here.items()
        if stored.get(key) != value
    ]
    described = ", ".join(f"{key} {stored[key]}" for key in here if stored.get(key))
    raise ValueError(
        "the network's outputs on this machine are not those of the machine that made the file, so every image would "
        f"come out wrong: {'; '.join(differences) or 'versions and processor are equal, but some library is not'}. "
        f"Decode it where it was made, or with the same: {described}."
    )


def _accelerator_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""
