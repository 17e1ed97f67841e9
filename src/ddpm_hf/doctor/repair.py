"""A repaired copy of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DModel

from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..storage.files import check_writable
from .finding import Finding


def check_output(output: Path) -> None:
    """Raise a ValueError unless a model can be written into this folder, which must be new or empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`fix` is {str(output)!r}, but it exists: name a new folder for the repaired copy.")
    check_writable(output)


def write_repaired(pipe: DDPMPipelineCustom, findings: Sequence[Finding], output: Path) -> list[Finding]:
    """Save a copy of a model with the repairs of these findings.

    Returns:
        The findings that it repairs.
    """
    repaired = [finding for finding in findings if finding.repair is not None]
    scheduler: dict[str, Any] = {**pipe.scheduler.config}
    settings: dict[str, Any] = {**pipe.unet.config}
    weights = dict(pipe.unet.state_dict())
    for repair in (finding.repair for finding in repaired if finding.repair is not None):
        scheduler |= repair.scheduler
        settings |= repair.unet
        weights = weights if repair.weights is None else repair.weights(weights)
    scheduler = {k: v for k, v in scheduler.items() if v is not None or not k.startswith("_")}
    unet = UNet2DModel.from_config(settings)
    unet.load_state_dict({name: weight.cpu().contiguous() for name, weight in weights.items()})
    copy = DDPMPipelineCustom(unet, DDPMSchedulerCustom.from_config(scheduler))
    copy.save_pretrained(output)
    return repaired
