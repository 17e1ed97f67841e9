"""The scheduler's configuration, as far as no network is needed to judge it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from diffusers import UNet2DModel
from torch import Tensor

from ..diffusion.ddpm_process import LEARNED_VARIANCE_TYPES
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from .finding import Finding, Repair

DEFAULT_STEPS = 1000  # of stock pipelines
USUAL_STEPS = (250, 100, 50, 25, 20, 10)
MUCH_SIGNAL = 0.01  # ᾱ at the start of sampling, from pure noise
CHANGED_PIXELS = 0.001  # share of the pixels of real images


def examine_scheduler(scheduler: DDPMSchedulerCustom, x_0: Tensor | None) -> Iterator[Finding]:
    """Faults of a scheduler.

    Args:
        x_0: real images in [-1, 1], (N, C, H, W), if there are any.
    """
    yield from _examine_terminal_snr(scheduler)
    yield from _examine_spacing(scheduler)
    yield from _examine_calibration(scheduler)
    if x_0 is not None:
        yield from _examine_clipping(scheduler, x_0)


def without_calibration(scheduler: DDPMSchedulerCustom, **changes: Any) -> dict[str, Any]:
    """Changes of the process, which make a calibration invalid."""
    return {**changes, "_calibration": None} if scheduler.config.get("_calibration") is not None else changes


def _examine_terminal_snr(scheduler: DDPMSchedulerCustom) -> Iterator[Finding]:
    last = float(scheduler.alphas_cumprod[-1])
    if scheduler.process.has_zero_terminal_snr and scheduler.config.prediction_type == "epsilon":
        yield Finding(
            "zero terminal SNR", "The schedule ends at zero SNR, but the network predicts ε.",
            f"ᾱ_T = {last:.1g}: x_0 = (x_T - s ε)/a divides by a = 0", "Sampling is refused, or makes NaN.",
            repair=Repair(scheduler=without_calibration(scheduler, rescale_betas_zero_snr=False)),
        )  # fmt: skip
    elif last > MUCH_SIGNAL:
        yield Finding(
            "terminal SNR", "The schedule never reaches noise: sampling starts from what training never saw.",
            f"ᾱ_T = {last:.3g} at T = {len(scheduler)}: {last**0.5:.0%} of the image's contrast is left where sampling "
            f"starts from pure noise; below {MUCH_SIGNAL} is usual",
            "Samples have the wrong brightness and contrast, and lack variety.",
            "If the network was trained otherwise, `--dataset` finds out how; else train again with "
            "--ddpm_beta_schedule squaredcos_cap_v2, which suits every T.",
        )  # fmt: skip


def _examine_spacing(scheduler: DDPMSchedulerCustom) -> Iterator[Finding]:
    """Trajectories that start below T - 1, where a noisy image still shows: of the default number of steps, or few."""
    if scheduler.process.has_zero_terminal_snr and scheduler.config.prediction_type == "epsilon":
        return
    T = len(scheduler)
    for steps in (min(DEFAULT_STEPS, T), *USUAL_STEPS):
        if steps > T:
            continue
        probe = DDPMSchedulerCustom.from_config(scheduler.config)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                probe.set_timesteps(steps)
        except ValueError as error:
            yield Finding(
                "spacing", "The scheduler's spacing makes no valid timesteps.", f"{steps} steps: {error}",
                "Sampling is refused.",
                repair=Repair(scheduler={"timestep_spacing": "linspace", "steps_offset": 0}),
            )  # fmt: skip
            return
        start = int(probe.timesteps[0])
        signal = float(scheduler.alphas_cumprod[start])
        if start < T - 1 and signal > MUCH_SIGNAL:
            few = steps < min(USUAL_STEPS[2], T)
            yield Finding(
                "spacing", f"The spacing {scheduler.config.timestep_spacing!r} starts within the image.",
                f"{steps} steps start at t = {start} of {T - 1}, where ᾱ = {signal:.3g}: {signal**0.5:.0%} of the "
                "image's contrast is expected, and none is there",
                "Samples are too flat or too dark, and lack variety" + (", in few steps." if few else "."),
                repair=Repair(scheduler={"timestep_spacing": "linspace"}),
                severity="note" if few else "fault",
            )  # fmt: skip
            return


def fitting_variance(unet: UNet2DModel) -> dict[str, str]:
    """A variance that any scheduler can have for this network: the learned one, if it has the channels."""
    return {"variance_type": "learned_range" if unet.config.out_channels > unet.config.in_channels else "fixed_small"}


def examine_variance(variance_type: str, unet: UNet2DModel) -> Iterator[Finding]:
    """A variance that does not fit the network's output.

    Args:
        variance_type: as the scheduler's file has it.
    """
    learned = variance_type in LEARNED_VARIANCE_TYPES
    channels, out = unet.config.in_channels, unet.config.out_channels
    if variance_type != "optimal" and learned != (out != channels):
        yield Finding(
            "variance",
            f"The scheduler expects a learned variance ({variance_type}), but this network has none."
            if learned
            else f"The network predicts a variance, but the scheduler has a fixed one ({variance_type}).",
            f"{out} output channels, and {2 * channels if learned else channels} expected",
            "The model can't be loaded, or stock schedulers stop with an error of shapes.",
            repair=Repair(scheduler=fitting_variance(unet)),
        )


def _examine_calibration(scheduler: DDPMSchedulerCustom) -> Iterator[Finding]:
    if scheduler.config.get("_calibration") is None:
        return
    try:
        _ = scheduler.calibration
    except ValueError as error:
        yield Finding(
            "stale calibration", "The calibration is of another process, or damaged.", str(error),
            "The optimal variance and the optimal timesteps are refused.",
            "{fix}, which removes it; then ddpm-hf calibrate again", Repair(scheduler={"_calibration": None}),
        )  # fmt: skip


def _examine_clipping(scheduler: DDPMSchedulerCustom, x_0: Tensor) -> Iterator[Finding]:
    """Limits of x̂_0 that change real images."""
    changed = (scheduler.limit_x_0(x_0) - x_0).abs() > 1 / 255
    share = float(changed.double().mean())
    if share > CHANGED_PIXELS:
        how = (
            "thresholding"
            if scheduler.config.thresholding
            else f"clip_sample_range {scheduler.config.clip_sample_range}"
        )
        yield Finding(
            "clipping", f"The scheduler's {how} changes real images.",
            f"{share:.1%} of their pixels change by more than a level of 255",
            "No sample can have the contrast of the training images.",
            repair=Repair(
                scheduler=without_calibration(scheduler, thresholding=False, clip_sample=True, clip_sample_range=1.0)
            ),
        )  # fmt: skip
