"""What a sampling loop needs beside the network, as JSON: the contract of `sampler.json` (docs: demo.md).

With n = 1 … K, `row` the n-th of `steps`, z(n) ~ N(0, 1) and x̂_0' the x̂_0 of the step before (any, at the first step):

    x = z(0)
    out   = network(x, row.t)
    x̂_0   = limit(row.x_0_from_x_t · x + row.x_0_from_output · out)
    x     = row.mean_from_x_0 · (x̂_0 + row.extrapolation · (x̂_0 - x̂_0')) + row.mean_from_x_t · x + row.std · z(n)
"""

from __future__ import annotations

from typing import Any

from ..diffusion.ddpm_labels import label_names
from ..diffusion.ddpm_process import LEARNED_VARIANCE_TYPES
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom, StepCoefficients

FORMAT = "ddpm-hf sampler 1"


def sampler_table(
    pipeline: DDPMPipelineCustom,
    num_inference_steps: int | None = None,
    timesteps: str | None = None,
    eta: float | None = None,
    solver_order: int = 1,
) -> dict[str, Any]:
    """The contract of a model and one trajectory, for JSON: see docs/pages/demo.md.

    Args:
        num_inference_steps: K; by default T.
        timesteps: the name of a spacing; by default that of the scheduler.
        eta: in [0, 1]; by default 1.
        solver_order: 1 or 2.

    Raises:
        ValueError: for a bad argument, or a scheduler that is not ours.
    """
    scheduler = pipeline.scheduler_on_trajectory(num_inference_steps, timesteps)
    if not isinstance(scheduler, DDPMSchedulerCustom):
        raise ValueError(f"the scheduler is a {type(scheduler).__name__}, but only a DDPM's has a table of steps.")
    config, unet = scheduler.config, pipeline.unet
    height, width = image_size(unet)
    is_learned = config.variance_type in LEARNED_VARIANCE_TYPES
    classes = unet.config.num_class_embeds
    eta = 1.0 if eta is None else float(eta)
    return {
        "format": FORMAT,
        "image": {"channels": unet.config.in_channels, "height": height, "width": width, "range": [-1, 1]},
        "num_classes": classes,
        "null_class": classes - 1 if classes else None,
        "class_names": label_names(unet.config),
        "prediction_type": config.prediction_type,
        "variance_type": config.variance_type,
        "clip": config.clip_sample_range if config.clip_sample and not config.thresholding else None,
        "threshold": {"ratio": config.dynamic_thresholding_ratio, "max": config.sample_max_value}
        if config.thresholding
        else None,
        "random_numbers": "philox4x32-10, box-muller",
        "process": {
            "num_train_timesteps": len(scheduler),
            "betas": scheduler.betas.tolist(),
            "timestep_spacing": config.timestep_spacing,
            "steps_offset": config.steps_offset,
            "x_0_error": scheduler.calibration.x_0_error.tolist() if config.get("_calibration") else None,
        },
        "trajectory": {
            "num_inference_steps": len(scheduler.timesteps),
            "eta": eta,
            "solver_order": solver_order,
            "steps": _rows(scheduler, eta, solver_order, is_learned),
        },
    }


def _rows(scheduler: DDPMSchedulerCustom, eta: float, solver_order: int, is_learned: bool) -> list[dict[str, Any]]:
    table = scheduler.coefficient_table(eta)
    rows = []
    for t in scheduler.timesteps.tolist():
        row: dict[str, Any] = {"t": t, **dict(zip(StepCoefficients._fields, table[t].tolist(), strict=True))}
        if solver_order == 1:
            row["extrapolation"] = 0.0
        unused = ("std",) if is_learned else ("noise_scale", "log_variance_low", "log_variance_high")
        rows.append({name: value for name, value in row.items() if name not in unused})
    return rows
