"""How the network was really trained, by its errors on images: prediction type, schedule, T, pixels, configuration."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DModel

from ..diffusion.ddpm_process import PREDICTION_TYPES
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from .classes import examine_classes
from .finding import Finding, Repair, Weights
from .layers import examine_layers, finding, reorder_channels, undone
from .readings import AS_IS, FEW_LEVELS, LEVELS, Errors, Pixels, Reading, Schedule, best_reading, excess
from .scheduler import without_calibration

EXCESS = 1.05  # of the declared reading's error over the best one's, geometric mean over noise levels
SIGMAS = 4.0  # and by as many standard errors
MUCH_WORSE = 100.0  # than a linear guess: a network that is so is random, or hopeless
UNTRAINED = 0.9  # of the error of a linear guess

USUAL_T = (1000, 250, 500, 2000, 4000)
# Settings of UNet2DModel that change no shape of its weights: what another program may have written otherwise.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"flip_sin_to_cos": False}, {"flip_sin_to_cos": True}, {"freq_shift": 0}, {"freq_shift": 1},
    {"flip_sin_to_cos": False, "freq_shift": 1}, {"flip_sin_to_cos": True, "freq_shift": 0},
    {"center_input_sample": False}, {"center_input_sample": True}, {"act_fn": "silu"}, {"act_fn": "relu"},
    {"norm_eps": 1e-5}, {"norm_eps": 1e-6},
    {"norm_num_groups": 4}, {"norm_num_groups": 8}, {"norm_num_groups": 16}, {"norm_num_groups": 32},
    {"attention_head_dim": 8}, {"attention_head_dim": 16}, {"attention_head_dim": 32}, {"attention_head_dim": 64},
    {"attention_head_dim": None}, {"act_fn": "gelu"}, {"act_fn": "mish"}, {"norm_num_groups": 1},
    {"downsample_padding": 0}, {"downsample_padding": 1}, {"mid_block_scale_factor": 1}, {"norm_eps": 1e-3},
    # the network of the paper's authors, and the defaults of diffusers
    {"flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0, "norm_eps": 1e-6},
    {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "norm_eps": 1e-5},
)  # fmt: skip


def declared_schedule(scheduler: DDPMSchedulerCustom) -> Schedule:
    """The schedule of a scheduler."""
    keys = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
    config = {"num_train_timesteps": len(scheduler), **{k: scheduler.config[k] for k in keys}}
    name = "trained_betas" if config["trained_betas"] is not None else str(config["beta_schedule"])
    T = len(scheduler)
    log_snr = scheduler.process.log_snr(torch.arange(T)).clamp(-30, 30)
    return Schedule(f"{name} with T = {T}", config, tuple(log_snr.tolist()))


def usual_schedules(T: int) -> list[Schedule]:
    """Schedules that networks are trained with, at the declared T and at others."""
    found: dict[tuple[float, ...], Schedule] = {}
    for steps in dict.fromkeys((T, *USUAL_T)):
        betas = {"beta_start": 1e-4, "beta_end": 0.02}
        scaled = {"beta_start": 0.1 / steps, "beta_end": 20 / steps}  # improved-diffusion's, for T other than 1000
        options: list[dict[str, Any]] = [
            {"beta_schedule": "linear", **betas},
            {"beta_schedule": "squaredcos_cap_v2", **betas},
            {"beta_schedule": "scaled_linear", **betas},
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
            {"beta_schedule": "sigmoid", **betas},
            *([{"beta_schedule": "linear", **scaled}] if steps != 1000 and scaled["beta_end"] < 1 else []),
        ]
        for option in options:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of betas that never reach noise
                schedule = declared_schedule(DDPMSchedulerCustom(num_train_timesteps=steps, **option))
            found.setdefault(schedule.log_snr, schedule)
    return list(found.values())


def examine_training(
    scheduler: DDPMSchedulerCustom, unet: UNet2DModel, errors: Errors, show_progress: bool = True
) -> Iterator[Finding]:
    """Where scheduler, weights and configuration do not belong together. Nothing if nothing is better than as declared.

    Args:
        errors: of this network, on images of its training.
    """
    declared = Reading(declared_schedule(scheduler), scheduler.config.prediction_type)
    schedules = usual_schedules(len(scheduler))
    best = best_reading(errors, declared, schedules, show_progress=show_progress)
    share = _share_of_trivial(errors, best)

    variant, of_variant = _best_variant(unet, errors, best, declared)
    # In a random network, less of any layer is better: that is no explanation, as the share of the changed one shows.
    change, of_change = examine_layers(unet, errors, declared, best) if share < MUCH_WORSE else (None, 1.0)
    changed, found = errors, None
    if variant and of_variant <= of_change:
        changed, found = _with_variant(unet, errors, variant), _wrong_settings(unet, errors, variant, of_variant)
    elif change:
        whole = copy.deepcopy(unet)
        whole.load_state_dict(undone(change, dict(unet.state_dict())))
        changed = errors.again(whole)
        found = finding(change, of_change, errors)
    if found:
        best_of_changed = best_reading(changed, declared, schedules, show_progress=show_progress)
        share_of_changed = _share_of_trivial(changed, best_of_changed)
        if share_of_changed <= UNTRAINED:  # else it is no explanation
            yield found
            errors, best, share = changed, best_of_changed, share_of_changed
    if share > UNTRAINED:
        yield Finding(
            "not trained on these images", "The network predicts no better than a linear guess, however it is read.",
            f"its error is {share:.2f} of that of the guess, at best; {len(errors.x_0)} images at {len(LEVELS)} noise "
            "levels",
            "Samples do not look like these images. It was trained on others, or hardly at all; whether its scheduler "
            "is right can't be told.", "Pass the images that it was trained on, or train on.", severity="note",
        )  # fmt: skip
        return
    yield from _compare(scheduler, errors, declared, best, share)
    yield from examine_classes(errors, best)


def _share_of_trivial(errors: Errors, reading: Reading) -> float:
    found = errors.of(reading).mean(1)
    share = float((found / errors.trivial()).log().mean().exp())
    return share if share == share else float("inf")


def _compare(
    scheduler: DDPMSchedulerCustom, errors: Errors, declared: Reading, best: Reading, share: float
) -> Iterator[Finding]:
    """A finding for each part of the declared reading that, put into the best one, raises its error."""
    of_best = errors.of(best)

    def cost(worse: Reading) -> float | None:
        """By what factor the error rises, if it does so beyond doubt."""
        found = errors.of(worse)
        if not found.isfinite().all():
            return float("inf")
        factor, error = excess(found, of_best)
        return factor if factor > EXCESS and factor > 1 + SIGMAS * error else None

    def evidence(factor: float, wrong: str, right: str) -> str:
        images = f"{len(errors.x_0)} images at {len(LEVELS)} noise levels"
        return (
            f"read as {wrong}, its error is {factor:.3g} times that as {right}, which is {share:.2f} of a linear "
            f"guess's; {images}"
        )

    if best.prediction_type != declared.prediction_type:
        factor = cost(replace(best, prediction_type=declared.prediction_type))
        if factor:
            yield Finding(
                "prediction type",
                f"The network predicts {best.prediction_type}, but the scheduler says {declared.prediction_type}.",
                evidence(factor, declared.prediction_type, best.prediction_type), "Samples are noise, or gray.",
                repair=Repair(scheduler=without_calibration(scheduler, prediction_type=best.prediction_type)),
            )  # fmt: skip
    if best.schedule != declared.schedule:
        factor = cost(replace(best, schedule=declared.schedule))
        if factor:
            same = best.schedule.config["beta_schedule"] == declared.schedule.config["beta_schedule"]
            only_T = same and len(best.schedule.log_snr) != len(declared.schedule.log_snr)
            yield Finding(
                "timesteps" if only_T else "schedule",
                f"The network was trained with the noise schedule {_in_words(best.schedule)}, but the scheduler has "
                f"{_in_words(declared.schedule)}.",
                evidence(factor, declared.schedule.name, best.schedule.name),
                "At every step the network is told of more or less noise than there is: samples are blurred or noisy.",
                repair=Repair(scheduler=without_calibration(scheduler, **best.schedule.config)),
            )  # fmt: skip
    if best.pixels != AS_IS:
        factor = cost(replace(best, pixels=AS_IS))
        if factor:
            yield _wrong_pixels(best.pixels, evidence(factor, "[-1, 1]", best.pixels.name))


def _in_words(schedule: Schedule) -> str:
    ends = "" if schedule.config["beta_schedule"] == "squaredcos_cap_v2" else (
        f" from {schedule.config['beta_start']:.3g} to {schedule.config['beta_end']:.3g}"
    )  # fmt: skip
    return f"{schedule.name}{ends}"


def _wrong_pixels(pixels: Pixels, evidence: str) -> Finding:
    if pixels.order:
        is_reverse = pixels.order == (2, 1, 0)
        how = (
            "in reverse: BGR instead of RGB" if is_reverse else f"in another order: {', '.join(map(str, pixels.order))}"
        )
        inverse = tuple(sorted(range(len(pixels.order)), key=pixels.order.__getitem__))
        return Finding(
            "channel order", f"The network knows images with their channels {how}.", evidence,
            f"{'Red and blue' if is_reverse else 'Colors'} are swapped in every sample.",
            repair=Repair(weights=partial(reorder_channels, inverse)),
        )  # fmt: skip
    if pixels.transposed:
        return Finding(
            "transposed images", "The network knows images with their rows for columns.", evidence,
            "Every sample lies on its side, mirrored.", repair=Repair(weights=_transpose_kernels),
        )  # fmt: skip
    if pixels.scale == -1:
        return Finding(
            "inverted", "The network knows inverted images: white for black.", evidence,
            "Every sample is a negative.", repair=Repair(weights=_invert),
        )  # fmt: skip
    return Finding(
        "pixel range", f"The network was trained on images in {pixels.name}, but samples are taken to lie in [-1, 1].",
        evidence, "Samples are pale, and bits/dim and calibration are wrong. Noise was relatively stronger in training "
        "than its schedule says, so no setting repairs it.",
        "Train again on images in [-1, 1] (ddpm-hf train does so); until then, sample with output_type='latent' and "
        f"divide by {pixels.scale:g} what is above {pixels.shift:g}.",
    )  # fmt: skip


def _reverse_channels(weights: Weights) -> Weights:
    """The same network for images with their channels in reverse: its first and last layer, permuted."""
    channels = weights["conv_in.weight"].shape[1]

    def reverse(outputs: Any) -> Any:
        """Of each image's worth of outputs: those of a learned variance, too."""
        return torch.cat([part.flip(0) for part in outputs.split(channels)])

    return {
        **weights,
        "conv_in.weight": weights["conv_in.weight"].flip(1).contiguous(),
        "conv_out.weight": reverse(weights["conv_out.weight"]),
        "conv_out.bias": reverse(weights["conv_out.bias"]),
    }


def _transpose_kernels(weights: Weights) -> Weights:
    """The same network for images with rows and columns exchanged."""
    return {name: w.transpose(2, 3).contiguous() if w.ndim == 4 else w for name, w in weights.items()}


def _invert(weights: Weights) -> Weights:
    """The same network for -x: f(x) becomes -f(-x), of the outputs that are an image."""
    channels = weights["conv_in.weight"].shape[1]
    signs = torch.ones(len(weights["conv_out.bias"]))
    signs[:channels] = -1
    return {
        **weights,
        "conv_in.weight": -weights["conv_in.weight"],
        "conv_out.weight": weights["conv_out.weight"] * signs[:, None, None, None],
        "conv_out.bias": weights["conv_out.bias"] * signs,
    }


# --- settings of the network ------------------------------------------------------------------------------------------


def _wrong_settings(unet: UNet2DModel, errors: Errors, variant: dict[str, Any], factor: float) -> Finding:
    settings = ", ".join(f"{k} = {v}, not {unet.config[k]}" for k, v in variant.items())
    return Finding(
        "network configuration", f"The weights were trained with other settings of the network: {settings}.",
        f"with them the error on {len(errors.x_0)} images falls to {factor:.2f} of what it is",
        "Samples are blurred, or noise.", repair=Repair(unet=variant),
    )  # fmt: skip


def _best_variant(unet: UNet2DModel, errors: Errors, best: Reading, declared: Reading) -> tuple[dict[str, Any], float]:
    """Settings of the network under which its error is clearly less, and by what factor; none if there are none.

    Args:
        best: the reading of least error of the network as it is.
        declared: the other one that is tried, since wrong settings may have misled the search for the best.
    """
    readings = {best, *(replace(declared, prediction_type=kind) for kind in PREDICTION_TYPES)}
    few: list[tuple[float, dict[str, Any], Errors]] = []
    for variant in VARIANTS:
        change = {k: v for k, v in variant.items() if unet.config[k] != v}
        if not change or any(change == known for _, known, _ in few):
            continue
        try:
            other = _with_variant(unet, errors, change)
            factors = [
                excess(other.of(reading, FEW_LEVELS, errors.few), errors.of(best, FEW_LEVELS, errors.few))[0]
                for reading in readings
            ]
        except (ValueError, RuntimeError):  # channels that can't be divided so
            continue
        few.append((min((f for f in factors if f == f), default=1.0), change, other))
    factor, change, other = min(few, key=lambda item: item[0])
    if factor < 1 / EXCESS:
        for reading in readings:
            factor, error = excess(other.of(reading), errors.of(best))
            if factor < 1 / EXCESS and 1 / factor - 1 > SIGMAS * error:
                return change, factor
    return {}, 1.0


def _with_variant(unet: UNet2DModel, errors: Errors, change: dict[str, Any]) -> Errors:
    """The same errors of the same weights, in a network of other settings."""
    network: Callable[..., Any] = UNet2DModel.from_config({**unet.config, **change})
    network.load_state_dict(unet.state_dict())  # type: ignore[attr-defined]
    return errors.again(network.to(unet.device))  # type: ignore[attr-defined]
