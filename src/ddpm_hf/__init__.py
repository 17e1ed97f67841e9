"""DDPM (Ho et al. 2020) for the Hugging Face ecosystem: process, scheduler, pipeline, training.

The public names are imported when they are first used, so that `import ddpm_hf` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codec.compress import compress
    from .codec.decompress import decompress
    from .codec.lossy import compress_progressive
    from .config.commands import EvaluateConfig
    from .config.training import TrainConfig
    from .diffusion.ddpm_process import DDPMProcess
    from .diffusion.pipeline import DDPMPipelineCustom
    from .diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
    from .evaluation.calibration import calibrate
    from .evaluation.evaluate import evaluate
    from .evaluation.likelihood import bits_per_dim, rate_distortion
    from .export.export import export_onnx
    from .restoration.edit import edit, interpolate, invert, variations
    from .restoration.operators import Blur, Compose, Downsample, Grayscale, Inpaint
    from .restoration.restore import restore
    from .sampling.folder import sample_to_folder
    from .sharing.conversion.convert import convert_model
    from .sharing.push import push_folder
    from .storage.loading import load_pipeline
    from .training.loop import train

__version__ = "0.2.0"

_MODULES = {
    "Blur": "restoration.operators",
    "Compose": "restoration.operators",
    "DDPMPipelineCustom": "diffusion.pipeline",
    "DDPMProcess": "diffusion.ddpm_process",
    "DDPMSchedulerCustom": "diffusion.scheduling_ddpm_custom",
    "Downsample": "restoration.operators",
    "EvaluateConfig": "config.commands",
    "Grayscale": "restoration.operators",
    "Inpaint": "restoration.operators",
    "TrainConfig": "config.training",
    "bits_per_dim": "evaluation.likelihood",
    "calibrate": "evaluation.calibration",
    "compress": "codec.compress",
    "compress_progressive": "codec.lossy",
    "convert_model": "sharing.conversion.convert",
    "decompress": "codec.decompress",
    "edit": "restoration.edit",
    "evaluate": "evaluation.evaluate",
    "export_onnx": "export.export",
    "interpolate": "restoration.edit",
    "invert": "restoration.edit",
    "load_pipeline": "storage.loading",
    "push_folder": "sharing.push",
    "rate_distortion": "evaluation.likelihood",
    "restore": "restoration.restore",
    "sample_to_folder": "sampling.folder",
    "train": "training.loop",
    "variations": "restoration.edit",
}

__all__ = [
    "Blur",
    "Compose",
    "DDPMPipelineCustom",
    "DDPMProcess",
    "DDPMSchedulerCustom",
    "Downsample",
    "EvaluateConfig",
    "Grayscale",
    "Inpaint",
    "TrainConfig",
    "__version__",
    "bits_per_dim",
    "calibrate",
    "compress",
    "compress_progressive",
    "convert_model",
    "decompress",
    "edit",
    "evaluate",
    "export_onnx",
    "interpolate",
    "invert",
    "load_pipeline",
    "push_folder",
    "rate_distortion",
    "restore",
    "sample_to_folder",
    "train",
    "variations",
]


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
