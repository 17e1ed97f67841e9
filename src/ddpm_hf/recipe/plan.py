"""The plan of a run: the options that a set of images, a machine and a time lead to, and why, in a few lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from ..config.options import duration
from ..config.training import TrainConfig
from . import rules
from .images import Look

FINISHING_SHARE, FINISHING_SECONDS = 0.07, 3.0  # of the time: previews, validation and checkpoints; card and pictures
LEAST_TRAINING = 15.0  # seconds, where no update was measured
MAX_TRIALS = 6
OF_LARGER = 0.5  # power of operations that the speed of larger networks goes with: 0.3 to 0.8 were measured on a CPU
# What no experience of ours depends on the images or the time for: the recipe of the digits, measured there.
ALWAYS: dict[str, Any] = {
    "center_crop": True,
    "prediction_type": "v_prediction",
    "ddpm_beta_schedule": "squaredcos_cap_v2",
    "lr_scheduler": "cosine",
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_weight_decay": 1e-4,
    "use_ema": True,
    "mixed_precision": "auto",
    "channels_last": "auto",
    "compile": "auto",
    "on_bad_image": "skip",
}


@dataclass(frozen=True)
class Trial:
    """A network as it was measured: its options, size and speed."""

    options: dict[str, Any]
    parameters: int
    operations: float  # per image and pass
    update_seconds: float
    images_per_second: float
    threads: int | None = None  # of each process, on a CPU; None: as always


Measure = Callable[[dict[str, Any], bool], Trial | None]
Weigh = Callable[[dict[str, Any], int], tuple[int, float]]


@dataclass(frozen=True)
class RunPlan:
    """What to train, and what to say of it."""

    options: dict[str, Any]
    trial: Trial
    updates: int
    title: str
    reasons: list[tuple[str, str]]

    @property
    def lines(self) -> list[str]:
        """The plan for a terminal."""
        return [self.title, *(f"  {name:<11} {text}" for name, text in self.reasons)]


def make_plan(
    given: Mapping[str, Any],
    look: Look,
    seconds: float,
    end: datetime,
    processes: int,
    device: str,
    weigh: Weigh,
    measure: Measure,
) -> RunPlan:
    """Choose all options that are not given.

    Args:
        given: options of the user, which are kept.
        look: at the images.
        seconds: from the end of the measuring until the run has to end.
        end: when that is, for the person who reads the plan.
        device: the type of each process's device.
        weigh: parameters and operations of a network at a resolution.
        measure: trains a few updates with these options; None where the memory is too small. True stands for the last
            time, which has what the others have left of the time for it, or None for none.

    Raises:
        ValueError: where the time is too short, or no network fits the memory.
    """
    usable = (1 - FINISHING_SHARE) * seconds - FINISHING_SECONDS - (look.count or 0) * look.decode_seconds
    if usable <= 0:
        raise too_short(given, look, seconds, None)
    mode = {} if {"channels", "image_mode"} & set(given) else {"image_mode": look.mode}
    base = {**ALWAYS, **mode, "random_flip": rules.flips(look), **given}
    trial = choose_network(base, look, usable, processes, device, weigh, measure)
    if trial is None:
        raise ValueError(
            "not even the smallest network fits the memory of this machine: pass a smaller --resolution, or "
            "--train_batch_size 1."
        )
    again = measure({**base, **trial.options, "cpu_threads": trial.threads}, True)
    trial = trial if again is None else replace(again, options=trial.options)
    seen = trial.images_per_second * usable
    updates = int(usable / trial.update_seconds)
    if updates < rules.MIN_UPDATES:
        raise too_short(given, look, seconds, trial)
    calls = 3 * trial.images_per_second * seconds  # an update costs three network calls per image
    grid, steps, grids = rules.preview(calls)
    T = int(given.get("ddpm_num_steps", 1000))
    planned: dict[str, Any] = {
        **base,
        **trial.options,
        **rules.loss_weighting(given, trial.options["resolution"]),
        "cpu_threads": trial.threads,
        "learning_rate": rules.learning_rate(trial.parameters),
        "lr_warmup_steps": rules.warmup(updates),
        "ema_widths": rules.ema_widths(trial.parameters),
        "ddpm_num_inference_steps": min(T, steps),
        "eval_batch_size": grid,
        "save_images_steps": max(1, updates // grids),
        "checkpoints_total_limit": 1,
    }
    held_out = rules.held_out(look.count, calls)
    validations = rules.validations(calls, held_out, look.count)
    if validations:
        planned |= {"eval_images": held_out, "eval_steps": max(1, updates // validations)}
        planned["early_stopping_patience"] = rules.patience(validations)
        planned["load_best_model_at_end"] = rules.is_small(look.count)
    if not planned["use_ema"]:
        del planned["ema_widths"]
    options = {**planned, **given}
    title = f"Plan for {look.name} in {given['time_budget']}, until {end:%B %d, %H:%M:%S}:"
    return RunPlan(options, trial, updates, title, describe(TrainConfig(**options), given, look, trial, updates, seen))


def choose_network(
    base: Mapping[str, Any], look: Look, usable: float, processes: int, device: str, weigh: Weigh, measure: Measure
) -> Trial | None:
    """The largest network that sees the images that it wants, at the highest resolution at which one does.

    Speeds are measured; those of networks that were not are predicted from the nearest one that was, by operations, and
    rather too high than too low, since a network that seems fast enough is measured.
    """
    is_given = base.get("unet") is not None or base.get("model_config_name_or_path") is not None
    resolutions = [r for r in rules.RESOLUTIONS if r <= rules.natural_resolution(look)]
    for resolution in [base["resolution"]] if "resolution" in base else resolutions[::-1]:
        if is_given:
            candidates: list[dict[str, Any]] = [{"resolution": resolution}]
        else:
            candidates = [{"resolution": resolution, "unet": unet} for unet in rules.networks(resolution)]
        best = _largest(base, candidates, look, usable, processes, device, weigh, measure)
        is_last = resolution == resolutions[0] or "resolution" in base
        if best is not None and (is_last or _is_enough(best, resolution, usable)):
            return best
    return None


def _is_enough(trial: Trial, resolution: int, usable: float) -> bool:
    return trial.images_per_second * usable >= rules.images_wanted(trial.parameters, resolution)


def _largest(
    base: Mapping[str, Any],
    candidates: list[dict[str, Any]],
    look: Look,
    usable: float,
    processes: int,
    device: str,
    weigh: Weigh,
    measure: Measure,
) -> Trial | None:
    resolution = candidates[0]["resolution"]
    size = cache(lambda i: weigh({**base, **candidates[i]}, resolution))  # half a second for each
    trials: dict[tuple[int, int], Trial | None] = {}
    index, images = 0, rules.batch_size(0.0, look.count, resolution, device)
    while (index, images) not in trials and len(trials) < MAX_TRIALS:
        chosen = {**candidates[index], **_batches(base, images, processes)}
        trials[index, images] = _try(measure, {**base, **chosen}, chosen)
        known = {i: trial for (i, _), trial in trials.items() if trial is not None}  # the last batch of each
        if not known:
            return None
        limit = min((i for (i, _), trial in trials.items() if trial is None), default=len(candidates))
        index, seen = 0, known[min(known)].images_per_second * usable
        for i in range(limit):  # from small to large: each sees less, and wants more
            parameters, operations = size(i)
            nearest = known[min(known, key=lambda k: abs(k - i))]
            ratio = nearest.operations / operations
            predicted = nearest.images_per_second * ratio ** (OF_LARGER if ratio < 1 else 1) * usable
            if predicted < rules.images_wanted(parameters, resolution):
                break
            index, seen = i, predicted
        images = rules.batch_size(seen, look.count, resolution, device)
    return known[max((i for i in known if i <= index), default=min(known))]


def _batches(base: Mapping[str, Any], images: int, processes: int) -> dict[str, Any]:
    """The options of the batch for so many images per update, as far as they are not given."""
    if base.get("global_batch_size") is not None:
        share = base["global_batch_size"] // processes
        size = next(n for n in range(min(images, share), 0, -1) if share % n == 0)
        return {"train_batch_size": base.get("train_batch_size", size)}
    if base.get("train_batch_size") is not None:
        return {"train_batch_size": base["train_batch_size"]}
    return {"train_batch_size": max(1, images // processes // base.get("gradient_accumulation_steps", 1))}


def _try(measure: Measure, options: dict[str, Any], chosen: dict[str, Any]) -> Trial | None:
    """Measure; where the memory is too small, with smaller batches that are accumulated."""
    while True:
        trial = measure(options, False)
        size = options["train_batch_size"]
        if trial is not None:
            return replace(trial, options=chosen)
        if size == 1 or size == "auto":
            return None
        accumulation = 2 * options.get("gradient_accumulation_steps", 1)
        halves = {"train_batch_size": size // 2, "gradient_accumulation_steps": accumulation}
        options, chosen = {**options, **halves}, {**chosen, **halves}


def too_short(given: Mapping[str, Any], look: Look, seconds: float, trial: Trial | None) -> ValueError:
    """What a time that is too short would have to be."""
    start = duration(given["time_budget"], "time_budget") - seconds
    rest = FINISHING_SECONDS + (look.count or 0) * look.decode_seconds
    training = LEAST_TRAINING if trial is None else 1.5 * rules.MIN_UPDATES * trial.update_seconds
    needed = 1.1 * start + (rest + training) / (1 - FINISHING_SHARE)  # a longer time has more to measure in
    what = "" if trial is None else (
        f" One update of the smallest network takes {trial.update_seconds:.2g} s here, and {rules.MIN_UPDATES} are the "
        "least that is worth anything."
    )  # fmt: skip
    return ValueError(
        f"`time_budget` is {given['time_budget']}, but {start:.0f} s are over before training can start, and its end "
        f"takes {rest:.0f} s.{what} Pass --time_budget {rounded(needed)} or more"
        + (", or a smaller --resolution." if "resolution" in given else ".")
    )


def rounded(seconds: float) -> str:
    """A duration for a person, rounded up: 45s, 20m, 8h."""
    for unit, size in (("h", 3600), ("m", 60)):
        if seconds > 2 * size:
            return f"{math.ceil(seconds / size)}{unit}"
    return f"{5 * math.ceil(seconds / 5)}s"


def describe(
    config: TrainConfig, given: Mapping[str, Any], look: Look, trial: Trial, updates: int, seen: float
) -> list[tuple[str, str]]:
    """The plan for a person: what, why, how good to expect."""
    epochs = "" if not look.count else f", each {seen / look.count:,.1f} times"
    threads = ""
    if config.cpu_threads is not None:
        threads = f" with {config.cpu_threads} thread{'s' if config.cpu_threads > 1 else ''}"
    count = f"{look.count:,}" if look.count else "a stream of"
    kind = {"L": "gray", "LA": "gray, with transparency", "RGB": "color", "RGBA": "color, with transparency"}
    mirrored = (
        "mirrored at random, since left and right look alike" if config.random_flip else
        "never mirrored, since left and right differ" if not math.isnan(look.mirrored) else
        "not mirrored: too few to see whether left and right differ"
    )  # fmt: skip
    wanted = rules.images_wanted(trial.parameters, config.resolution)
    enough = "the largest that sees enough images in this time" if seen >= wanted else "more time would suit it"
    ends = "; training ends when they gain no more" if config.early_stopping_patience else ""
    held = (
        f"{config.eval_images} images, which are not trained on, to measure on{ends}" if config.eval_steps else
        "nothing: too few images, or too little time"
    )  # fmt: skip
    batch = round(trial.images_per_second * trial.update_seconds)
    size = f"{batch} image{'s' if batch > 1 else ''}"
    known = replace(look, folders=(), class_names=()) if config.label_column else look
    known = replace(known, transparent=0.0) if "image_mode" in given or "channels" in given else known
    return [
        ("images", f"{count}, {kind[str(config.image_mode)]}, {look.side} pixels (median); {mirrored}"),
        ("resolution", f"{config.resolution}×{config.resolution}: {_why_resolution(config.resolution, given, look)}"),
        ("network", f"{trial.parameters:,} parameters: {enough}"),
        (
            "training",
            f"about {updates:,} updates of {size} at {trial.images_per_second:,.0f} images/s{threads}: "
            f"{seen:,.0f} images{epochs}",
        ),
        (
            "recipe",
            f"{config.prediction_type.replace('_', '-')}, {config.ddpm_beta_schedule} schedule; learning rate "
            f"{config.learning_rate:g}, which falls to 0 with the time",
        ),
        ("held out", held),
        ("expect", rules.expectation(seen, trial.parameters, config.resolution)),
        ("output", f"{config.output_dir}; recipe.yaml there has all options"),
        *(("note", line) for line in rules.warnings(known, config.resolution)),
    ]


def _why_resolution(resolution: int, given: Mapping[str, Any], look: Look) -> str:
    natural = rules.natural_resolution(look)
    if "resolution" in given:
        return "as given"
    if resolution < natural:
        return f"at {natural}×{natural}, which the images allow, no network would see enough of them in this time"
    return "near the size of most images" if look.side < 1.5 * resolution else "the highest of a plan"
