"""`ddpm-hf train` in one process of a run: plan it, or take the plan of the run that resumes, and train."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.parsing import DEFAULT_PRESET, parse_given
from ..config.training import TrainConfig
from ..console import one_line_errors

if TYPE_CHECKING:
    from ..data.sources import Source, Stream
    from ..training.report import Reasons
    from .plan import RunPlan

STARTED = "DDPM_HF_STARTED"  # in the environment of a run's processes: when its command began, by `time.time`
MAX_SLOWDOWN = 3.0
MAX_SLOWDOWN_OF_START = 10.0
MEASURING_SHARE, MEASURING_SECONDS = 0.05, 60.0  # at most
LOOKING_SHARE = 0.05


def main(argv: Sequence[str]) -> None:
    """Read the options, plan, train. Foreseen errors end with one line; a signal with the status that shells expect.

    Args:
        argv: what follows `ddpm-hf train`, without the launcher's flags.
    """
    now = time.time()
    started = time.monotonic() - max(0.0, now - float(os.environ.get(STARTED, now)))
    with one_line_errors("Resume with --resume_from_checkpoint latest."):
        given = parse_given(argv)
        from ..training.interruption import Interrupted  # after the options: --help and mistakes answer at once
        from ..training.loop import train

        is_timed = given.get("time_budget") is not None
        config, reasons, source = planned(given, started) if is_timed else (TrainConfig(**given), [], None)
        try:
            train(config, started, reasons, source)
        except Interrupted as interrupted:
            sys.exit(128 + interrupted.signum)


def start_of_command(created: float, now: float, work: float) -> float:
    """When a command began, whose process may have been another before: a shell that did something first, then `exec`.

    Args:
        created: when the process was.
        now: soon after the command began.
        work: seconds of a core that the process has used.
    """
    return max(created, now - MAX_SLOWDOWN_OF_START * work)


def planned(given: dict[str, Any], started: float) -> tuple[TrainConfig, Reasons, Source | Stream | None]:
    """The configuration of a run with a time budget: as given, as in its checkpoint, or planned with reasons.

    Returns:
        The configuration, the reasons, and the images, if they have been opened.

    Raises:
        ValueError: for a time that is too short, more time for a run that does not exist, and what `train` refuses.
    """
    from ..training.output_folder import OF_ONE_COMMAND, prepare_output_dir
    from .machine import Machine

    machine = Machine()
    with machine.agreement.together():
        before = resumed_options(given) if machine.is_main else None
    before = machine.agreement.from_main(before)
    if before is not None:
        return TrainConfig(**before), [], None
    given = {"output_dir": output_dir_of(given), **given}
    if not any(given.get(name) for name in ("dataset_name", "train_data_dir")):
        given["dataset_name"] = DEFAULT_PRESET
    config = TrainConfig(**given)
    if {f.name for f in fields(TrainConfig)} - {"hub_token", *OF_ONE_COMMAND} <= set(given):
        if machine.is_main:
            print("All options are given, as by a recipe.yaml: nothing is planned anew.", flush=True)
        return config, [], None
    with machine.agreement.together():
        if machine.is_main:
            prepare_output_dir(Path(config.output_dir), config)
    plan, source = _plan(machine, given, config, started)
    return TrainConfig(**plan.options), plan.reasons, source


def resumed_options(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The options of the run that is to be continued, under those that are given; None for a new run.

    Raises:
        ValueError: for more time where there is no run to continue.
    """
    from ..storage.checkpoint import latest_checkpoint, read_progress
    from ..training.output_folder import OF_ONE_COMMAND

    adds_time = given["time_budget"].startswith("+")
    resume = given.get("resume_from_checkpoint") or ("latest" if adds_time else None)
    if resume is None:
        return None
    folder = Path(output_dir_of(given))
    checkpoint = latest_checkpoint(folder)[0] if resume == "latest" else Path(resume)
    if checkpoint is not None and not checkpoint.is_dir() and len(checkpoint.parts) == 1:
        checkpoint = folder / checkpoint
    if checkpoint is None or not checkpoint.is_dir():
        if adds_time:
            raise ValueError(
                f"`time_budget` is {given['time_budget']}, but {str(folder)!r} has no checkpoint to continue: leave "
                "out the +, or name the folder of the run with --output_dir."
            )
        return None
    known = {f.name for f in fields(TrainConfig)} - {*OF_ONE_COMMAND, "time_budget"}
    before = {name: value for name, value in read_progress(checkpoint)["config"].items() if name in known}
    if any(given.get(name) for name in ("dataset_name", "train_data_dir")):
        before |= {"dataset_name": None, "train_data_dir": None}
    before["max_train_steps"] = None
    return {**before, **given, "output_dir": str(folder), "resume_from_checkpoint": resume}


def output_dir_of(given: Mapping[str, Any]) -> str:
    """The output folder: the one that is given, or one named after the images."""
    images = given.get("train_data_dir") or given.get("dataset_name") or DEFAULT_PRESET
    return str(given.get("output_dir") or f"ddpm-{Path(images).absolute().stem.strip('*?') or 'model'}")


def _plan(machine: Any, given: dict[str, Any], config: TrainConfig, started: float) -> tuple[RunPlan, Source | Stream]:
    from ..data.sources import open_source, open_stream
    from .images import look_at
    from .machine import size_of_options
    from .plan import FINISHING_SECONDS, Trial, make_plan
    from .rules import multipliers

    if config.unet is None and config.model_config_name_or_path is None and "resolution" in given:
        multipliers(config.resolution)  # refuses before the images are looked at
    if machine.is_main:
        print(f"Looking at the images of {config.dataset_name or config.train_data_dir}.", flush=True)
    # By other programs: so much longer than their work the imports took. They are what has happened so far.
    elapsed = time.monotonic() - started
    slowdown = machine.agreement.largest_of_each(min(MAX_SLOWDOWN, max(1.0, elapsed / time.process_time())))[0]
    budget = config.budget_seconds or 0.0
    look = classes = None
    with machine.agreement.together(patiently=True):
        source = open_stream(config) if config.streaming else open_source(config)
        classes = len(source.label_names) if source.label_names else None
        if machine.is_main:
            look = look_at(source, config, LOOKING_SHARE * budget)
    look = machine.agreement.from_main(look)
    measured = 0.0  # seconds
    allowance = min(MEASURING_SHARE * budget, MEASURING_SECONDS)

    def weigh(options: dict[str, Any], resolution: int) -> tuple[int, float]:
        return size_of_options(TrainConfig(**options), classes)

    def measure(options: dict[str, Any], is_last: bool) -> Trial | None:
        nonlocal measured
        seconds = machine.agreement.from_main(allowance - measured) if is_last else allowance / 4
        if is_last and seconds < allowance / 4:
            return None
        began, candidate = time.monotonic(), TrainConfig(**options)
        parameters, operations = size_of_options(candidate, classes)
        if not machine.has_memory_for(parameters):
            return None
        images = candidate.batch_size * candidate.gradient_accumulation_steps * machine.state.num_processes
        if machine.is_main:
            what = f"{images} image{'s' if images > 1 else ''} at {candidate.resolution}×{candidate.resolution}"
            print(f"Measuring updates of {what} by a network of {parameters:,} parameters.", flush=True)
        update, threads = machine.best_threads(candidate, classes, seconds)
        measured += time.monotonic() - began
        return None if update is None else Trial(options, parameters, operations, update, images / update, threads)

    left = machine.agreement.from_main(budget - (time.monotonic() - started)) - allowance
    left -= FINISHING_SECONDS * (slowdown - 1)
    end = datetime.now() + timedelta(seconds=budget - (time.monotonic() - started))
    plan = make_plan(given, look, left, end, machine.state.num_processes, machine.state.device.type, weigh, measure)
    if machine.is_main:
        print("\n".join(plan.lines), flush=True)
    return plan, source
