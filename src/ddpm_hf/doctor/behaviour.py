"""What the network does: in half precision, without clipping, against its calibration, and in its samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..sampling.generate import eval_mode, sample_in_lockstep
from .finding import Finding, Repair
from .readings import FEW_LEVELS, Errors, Reading
from .scheduler import without_calibration
from .training import declared_schedule

HALF_COST = 1.05  # error in half precision, relative to float32
SAMPLING_STEPS = 25
CALIBRATION_TIMES = (0.1, 0.3, 0.5, 0.7)
STALE = 1.25  # measured over calibrated error, either way


def examine_half_precision(pipe: DDPMPipelineCustom, errors: Errors) -> Iterator[Finding]:
    """What bfloat16 and float16 cost this network, in its error on images."""
    reading = Reading(declared_schedule(pipe.scheduler), pipe.scheduler.config.prediction_type)
    exact = errors.of(reading, FEW_LEVELS, errors.few).mean(1)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        try:
            network = _Half(pipe.unet, dtype)
            found = errors.again(network).of(reading, FEW_LEVELS, errors.few).mean(1)
        except (RuntimeError, NotImplementedError):  # this device has no such arithmetic
            continue
        ratio = float((found / exact).log().mean().exp())
        if not math.isfinite(ratio) or ratio > HALF_COST:
            what = "overflows" if not math.isfinite(ratio) else "loses quality"
            yield Finding(
                "half precision", f"This network {what} in {name}.",
                f"its error there is {ratio:.3g} times that in float32", "Samples are worse there, or NaN.",
                f"Don't sample with --dtype {name}.", severity="note",
            )  # fmt: skip


class _Half(nn.Module):
    """A copy of a network in another precision, between float32 images."""

    def __init__(self, network: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = nn.Module.to(copy.deepcopy(network), dtype), dtype

    def forward(self, x: Tensor, t: Tensor, **options: Any) -> tuple[Tensor]:
        return (self.network(x.to(self.dtype), t, **options)[0].float(),)


@torch.no_grad()
def examine_unclipped(pipe: DDPMPipelineCustom, errors: Errors) -> Iterator[Finding]:
    """x̂_0 far outside of [-1, 1] at the start of the chain, where nothing clips it."""
    scheduler = pipe.scheduler
    if scheduler.config.clip_sample or scheduler.config.thresholding or scheduler.process.has_zero_terminal_snr:
        return
    t = len(scheduler) - 1
    x_t = scheduler.process.q_sample(errors.x_0, torch.tensor(t), errors.noise)
    with eval_mode(pipe.unet):
        output = pipe.unet(x_t, t, class_labels=errors.classes, return_dict=False)[0][:, : x_t.shape[1]]
    rms = float(scheduler.predict_x_0(output, x_t, t).square().mean().sqrt())
    if rms > 2:
        yield Finding(
            "clipping", "x̂_0 is not clipped, and leaves the range of images where the chain starts.",
            f"at t = {t} it has root mean square {rms:.1f}; an image in [-1, 1] has at most 1",
            "The chain starts with a wrong mean: samples are too bright, too dark, or noise.",
            repair=Repair(scheduler=without_calibration(scheduler, clip_sample=True, clip_sample_range=1.0)),
        )  # fmt: skip


@torch.no_grad()
def examine_calibrated_errors(pipe: DDPMPipelineCustom, errors: Errors) -> Iterator[Finding]:
    """A calibration that other weights were measured for: the errors that it holds are not those of this network."""
    scheduler: DDPMSchedulerCustom = pipe.scheduler
    if scheduler.config.get("_calibration") is None:
        return
    try:
        calibration = scheduler.calibration
    except ValueError:
        return  # is a finding of its own
    off = []
    with eval_mode(pipe.unet):
        for share in CALIBRATION_TIMES:
            t = int(share * (len(scheduler) - 1))
            x_t = scheduler.process.q_sample(errors.x_0, torch.tensor(t), errors.noise)
            output = pipe.unet(x_t, t, class_labels=errors.classes, return_dict=False)[0][:, : x_t.shape[1]]
            found = (scheduler.predict_x_0(output, x_t, t) - errors.x_0).square().flatten(1).mean(1).double()
            stored, stored_error = float(calibration.x_0_error[t]), float(calibration.x_0_error_standard_error[t])
            mean, error = float(found.mean()), float(found.std()) / len(found) ** 0.5
            ratio = mean / stored if stored else math.inf
            if max(ratio, 1 / ratio) > STALE and abs(mean - stored) > 5 * math.hypot(error, stored_error):
                off.append((t, ratio))
    if len(off) >= 2:
        t, ratio = max(off, key=lambda item: abs(math.log(item[1])))
        yield Finding(
            "stale calibration", "The calibration was measured on other weights, or other images.",
            f"at t = {t} the error of x̂_0 is {ratio:.2f} times what the calibration says, and at {len(off)} of "
            f"{len(CALIBRATION_TIMES)} timesteps beyond {STALE}",
            "The optimal variance and the optimal timesteps are wrong: few steps give noisy or smooth samples.",
            "{fix}, which removes it; then ddpm-hf calibrate again", Repair(scheduler={"_calibration": None}),
        )  # fmt: skip


# --- samples ----------------------------------------------------------------------------------------------------------


def draw_samples(pipe: DDPMPipelineCustom, count: int, seed: int, batch_size: int) -> Tensor:
    """Samples in few second-order steps from T - 1, uint8 (N, C, H, W)."""
    classes = pipe.unet.config.num_class_embeds
    return sample_in_lockstep(
        pipe,
        count,
        seed,
        batch_size,
        class_labels=range(classes) if classes else None,
        num_inference_steps=min(SAMPLING_STEPS, len(pipe.scheduler)),
        eta=0.0,
        solver_order=2,
    )


def examine_samples(samples: Tensor, real: Tensor | None, trusted: bool) -> Iterator[Finding]:
    """What samples betray, both in [-1, 1] and of shape (N, C, H, W).

    Args:
        real: images to compare with, if there are any.
        trusted: whether the network is known to be trained on these images, so that differences are faults.
    """
    about = _statistics(samples)
    if real is None:
        if about["contrast"] < 0.02:
            yield _of_samples("All samples are flat.", f"their standard deviation is {about['contrast']:.3f} of 1")
        elif about["neighbours"] < 0.2:
            yield _of_samples(
                "The samples look like noise.", f"neighbouring pixels correlate by {about['neighbours']:.2f}"
            )
        return
    usual, severity = _statistics(real), "fault" if trusted else "note"
    checks = (
        ("brightness", abs(about["mean"] - usual["mean"]) > 0.25, "The samples have another brightness", "mean"),
        ("contrast", _ratio(about, usual, "contrast") > 1.5, "The samples have another contrast", "contrast"),
        ("saturation", about["saturated"] > 1.5 * usual["saturated"] + 0.1, "The samples are saturated", "saturated"),
        ("noise", about["noise"] > 1.6 * usual["noise"] + 0.02, "Noise is left over in the samples", "noise"),
    )
    for name, is_off, what, key in checks:
        if is_off:
            yield _of_samples(
                f"{what}.", f"{name} {about[key]:.3f}, of the images {usual[key]:.3f}; {len(samples)} samples",
                severity,
            )  # fmt: skip


def _of_samples(what: str, evidence: str, severity: Any = "note") -> Finding:
    return Finding(
        "samples", what, evidence, "So every image that it makes, and FID.",
        "Look for its cause above; if there is none, look at the training: ddpm-hf evaluate measures it.",
        severity=severity,
    )  # fmt: skip


def _ratio(a: dict[str, float], b: dict[str, float], key: str) -> float:
    low, high = sorted((a[key], b[key]))
    return high / max(low, 1e-6)


def _statistics(x: Tensor) -> dict[str, float]:
    """Mean, contrast (standard deviation), saturated share, noise (Immerkær 1996), correlation of neighbours."""
    x = x.double()
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=torch.float64)[None, None]
    noise = nn.functional.conv2d(x.flatten(0, 1)[:, None], kernel).abs().mean() * math.sqrt(math.pi / 2) / 6
    centred = x - x.mean()
    power = float(centred.square().mean())
    return {
        "mean": float(x.mean()),
        "contrast": math.sqrt(power),
        "saturated": float((x.abs() > 0.99).double().mean()),
        "noise": float(noise),
        "neighbours": float((centred[..., 1:] * centred[..., :-1]).mean()) / max(power, 1e-12),
    }
