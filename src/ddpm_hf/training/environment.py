"""What this machine is, and what training and sampling will use of it: for bug reports, and for who wonders."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import default_config_file
from huggingface_hub import constants, get_token

from ..data.cache import cache_root
from ..sampling.fast import is_bfloat16_faster, missing_for_compilation
from ..storage.files import free_bytes
from .performance import expected_device

PACKAGES = (
    "ddpm-hf", "torch", "diffusers", "accelerate", "transformers", "datasets", "huggingface_hub", "safetensors",
    "numpy", "pillow",
)  # fmt: skip
EXTRAS = ("triton", "xformers", "torch-fidelity", "scikit-learn", "matplotlib", "tensorboard", "wandb", "trackio")
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT")  # none is secret
LARGE = 35_746_307  # parameters of the paper's network for CIFAR-10


def describe_environment() -> str:
    """Versions, device, precision, compiler, FSDP and cache folders, a line each. It names no secret."""
    device = expected_device()
    is_faster, reason = is_bfloat16_faster(device, LARGE)
    missing = missing_for_compilation(device)
    variables = {name: os.environ[name] for name in os.environ if name in VARIABLES or name.startswith("ACCELERATE_")}
    lines = {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
        "optional": ", ".join(f"{name} {_version(name)}" for name in EXTRAS),
        "device": _describe_device(device),
        "precision": f"{'bf16' if is_faster else 'no'} with --mixed_precision auto, because {reason}",
        "compiler": f"torch.compile needs {missing}" if missing else "torch.compile has all it needs",
        "FSDP": _describe_fsdp(device),
        "launcher": f"{default_config_file}{'' if Path(default_config_file).is_file() else ' (none)'}",
        "Hub token": "found" if get_token() else "none",
        "variables": ", ".join(f"{name}={value}" for name, value in sorted(variables.items())) or "none",
        **{name: f"{folder}, {free_bytes(folder) / 1e9:,.1f} GB free" for name, folder in _folders().items()},
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:{width}}{text}" for name, text in lines.items())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability(device)
        return (
            f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(device)}, {gpu.total_memory / 2**30:,.0f} GiB, "
            f"compute capability {major}.{minor}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    memory = psutil.virtual_memory().total / 2**30
    built = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, which finds no GPU"
    note = f"; torch is built {built}" if device.type == "cpu" else ""
    return f"{device.type}: {platform.machine()}, {os.cpu_count()} cores, {memory:,.0f} GiB{note}"


def _describe_fsdp(device: torch.device) -> str:
    if not dist.is_available():
        return "no: torch is built without torch.distributed"
    if device.type != "cuda":
        return f"no: it needs GPUs; several processes on {device.type} share the images by gloo"
    return f"yes, by NCCL, on {torch.cuda.device_count()} GPUs" if dist.is_nccl_available() else "no: NCCL is missing"


def _folders() -> dict[str, Path]:
    """What fills disks, by what it holds."""
    import datasets

    return {
        "models": Path(constants.HF_HUB_CACHE),
        "datasets": Path(datasets.config.HF_DATASETS_CACHE),
        "decoded images": cache_root(None),
        "here": Path.cwd(),
    }
