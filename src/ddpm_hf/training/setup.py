"""Before a run: everything that can be wrong is found here, before anything is decoded, trained or written."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, parse_flag_from_env

from ..config.training import TrainConfig
from ..data.dataset import Images
from ..data.pictures import check_plotting
from ..data.sources import Source, Stream, open_source, open_stream
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..distributed import TIMEOUT, Agreement
from ..sharing.hub import HubTarget
from ..storage.checkpoint import checkpoint_steps, read_progress
from ..storage.files import check_free_space, describe_bytes, free_bytes
from .batch_size import settle_batch_size
from .deadline import Clock, TimedPlan, make_clock
from .log import check_trackers
from .network import build_unet
from .output_folder import prepare_output_dir
from .performance import Performance, choose_performance, settle_precision
from .plan import Plan, settle_checkpoint_limit
from .publishing import check_target
from .state import MACHINE_OPTIONS, compare
from .validation_set import check_still_held_out, num_held_out, open_eval_split

SAMPLE_OF_DATA = 16  # images, drawn from all of them, whose pixels the processes compare


@dataclass
class Setup:
    """What a run starts from."""

    started: float  # on the clock of `time.monotonic`
    config: TrainConfig  # with numbers where options left them to the run
    accelerator: Accelerator
    agreement: Agreement
    scheduler: DDPMSchedulerCustom
    source: Source | Stream
    eval_split: Source | Stream | None  # None: the source is divided
    plan: Plan
    clock: Clock | None  # with a time budget
    num_parameters: int
    performance: Performance
    checkpoint: Path | None  # to resume from
    target: HubTarget | None  # to push to
    notes: list[str]  # for the user
    reasons: Sequence[tuple[str, str]]  # of its plan, for the page


def prepare(
    config: TrainConfig,
    started: float | None = None,
    reasons: Sequence[tuple[str, str]] = (),
    source: Source | Stream | None = None,
) -> Setup:
    """Check a configuration against the machine, the data, the output folder and the Hub.

    Args:
        started: when the command began, on the clock of `time.monotonic`. Default: now.
        reasons: of the plan of the run, which has been printed.
        source: the images, if they have been opened.

    Raises:
        ValueError: for whatever can't work, with the remedy.
        OSError: if the Hub is needed and can't be reached.
    """
    started = time.monotonic() if started is None else started
    output_dir = Path(config.output_dir)
    check_plotting()
    precision = settle_precision(config)
    accelerator = make_accelerator(config, precision.value, check_trackers(config))
    agreement = Agreement(accelerator.num_processes)
    is_main = accelerator.is_main_process
    options = {f"`{name}`": value for name, value in config.public().items() if name not in MACHINE_OPTIONS}
    agreement.check_same(options, "Give all of them the same options.")
    checkpoint: Path | None = None
    notes: list[str] = []
    progress: dict[str, Any] = {}
    with agreement.together():
        if is_main:  # others may not see the output folder
            checkpoint, notes = prepare_output_dir(output_dir, config)
            progress = read_progress(checkpoint) if checkpoint is not None else {}
    checkpoint, notes, progress = agreement.from_main((checkpoint, notes, progress))
    scheduler = DDPMSchedulerCustom(
        config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        timestep_spacing=config.timestep_spacing,
    )
    with agreement.together(patiently=True):  # each machine may have to download them
        if source is None:
            source = open_stream(config) if config.streaming else open_source(config)
        eval_split = open_eval_split(config, source)
    check_same_data(agreement, source)
    notes += source.notes if isinstance(source, Source) else ()
    label_names = source.label_names
    num_classes = len(label_names) if label_names else None
    with torch.device("meta"):
        unet = build_unet(config, num_classes)
    config, batch_notes = settle_batch_size(config, accelerator, agreement, scheduler.process, num_classes, progress)
    notes += batch_notes
    config = settle_checkpoint_limit(config, progress)
    clock = make_clock(config, started, accelerator.num_processes, progress)
    num_images = None if isinstance(source, Stream) else len(source) - num_held_out(config)
    done, seen = progress.get("step", 0), progress.get("images_seen", 0)
    if clock is None:
        plan = Plan(config, num_images, accelerator.num_processes, done, seen)
    else:
        plan = TimedPlan(config, num_images, accelerator.num_processes, done, seen).starting(clock)
    if checkpoint is not None:
        check_still_held_out(progress["config"], config)
        notes += compare(checkpoint, progress, config, plan, label_names)
        if clock is not None:
            left = timedelta(seconds=round(max(0.0, clock.left())))
            notes.append(f"Of the time, {left} (hours:minutes:seconds) are left.")
    if clock is None and config.lr_warmup_steps >= plan.max_steps and config.lr_scheduler != "constant":
        notes.append(f"Note: the warm-up of {config.lr_warmup_steps} updates is as long as the run, or longer.")
    performance = choose_performance(
        config, precision, accelerator, unet.num_parameters(), plan.max_steps - plan.steps_before
    )
    if clock is None or performance.is_unusual:
        notes += performance.notes
    if config.eval_steps is not None and not reasons:
        notes.append(f"Validation {plan.describe_validation()}.")
    if not reasons:
        notes.append(plan.describe(source.name, unet.num_parameters(), accelerator.device))
    with agreement.together():
        if is_main:
            existing = sum(step <= plan.steps_before for step in checkpoint_steps(output_dir))
            notes.append(plan.describe_checkpoints(existing, unet.num_parameters(), free_bytes(output_dir)))
            contents = f"checkpoints (kept: {plan.kept_checkpoints}; see --checkpoints_total_limit) and the pipeline"
            check_free_space(output_dir, plan.disk_needed(existing, unet.num_parameters()), contents)
        target = check_target(config) if is_main and not config.dry_run else None
    return Setup(
        started, config, accelerator, agreement, scheduler, source, eval_split, plan, clock, unet.num_parameters(),
        performance, checkpoint, target, notes, reasons,
    )  # fmt: skip


def check_same_data(agreement: Agreement, data: Source | Stream | Images) -> None:
    """Raise a ValueError in all processes unless all see the same data, as far as a quick look shows.

    Different numbers of images would make different numbers of updates, in which processes wait for each other.
    """
    seen: dict[str, Any] = {"the labels": data.label_names}
    if isinstance(data, Source) or (isinstance(data, Images) and data.has_length):
        seen["the number of images"] = len(data)
    if isinstance(data, Images) and data.has_length:
        first = data.sample(SAMPLE_OF_DATA, seed=0).numpy()
        seen["the pixels of the first images"] = f"SHA-256 {hashlib.sha256(first.tobytes()).hexdigest()[:16]}"
    agreement.check_same(seen, "Give all machines the same files, in the same order.")


def dry_run_report(config: TrainConfig, setup: Setup) -> str:
    """The resolved options, and what the run would need; where a plan has said so, that nothing more was done."""
    nothing = "Dry run: nothing was decoded, trained, pushed or written, except what `datasets` keeps in its own cache."
    if setup.reasons:
        return nothing
    plan, parameters = setup.plan, setup.num_parameters
    pixels = (plan.num_images or 0) * math.prod((config.channels or 3, config.resolution, config.resolution))
    decoded = pixels * (2 if config.preserve_input_precision else 1)
    number = f"as many as there is time for in {config.time_budget}," if setup.clock else f"{plan.max_steps:,}"
    return (
        f"{yaml.safe_dump(config.public(), sort_keys=False, allow_unicode=True)}\n"
        f"images       {plan.num_images or 'a stream'}, decoded {describe_bytes(decoded)}\n"
        f"network      {parameters:,} parameters\n"
        f"updates      {number} of {plan.global_batch} images\n"
        f"validation   {plan.describe_validation()}\n{nothing}"
    )


def make_accelerator(config: TrainConfig, precision: str | None, trackers: list[str]) -> Accelerator:
    """The Accelerator, as `accelerate launch` or torchrun has set it up.

    Raises:
        ValueError: for fp16 without a GPU, and for DeepSpeed.
    """
    folder = Path(config.output_dir)
    options: dict[str, Any] = {
        "log_with": trackers or None,
        "project_config": ProjectConfiguration(str(folder), logging_dir=str(folder / config.logging_dir)),
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=TIMEOUT)],
    }
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError("DeepSpeed is not supported: use FSDP, which shards weights and optimizer as ZeRO does.")
    accelerator = Accelerator(mixed_precision=precision, **options)
    accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps  # which overrides the environment
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`mixed_precision` is 'fp16', which needs a GPU: use bf16 or no.")
    use_cores(accelerator, config.cpu_threads)
    if accelerator.device.type == "cuda" and accelerator.mixed_precision != "no":
        torch.set_float32_matmul_precision("high")  # TF32
        # All batches have the same shape; but the fastest algorithm need not be the same next time.
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    return accelerator


def use_cores(accelerator: Accelerator | PartialState, threads: int | None = None) -> None:
    """On a CPU, use `threads`, by default the cores divided among the processes.

    `accelerate launch` would leave one to each. Without it, OMP_NUM_THREADS comes from the user and is respected.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type != "cpu":
        return
    if threads is not None:
        torch.set_num_threads(threads)
    elif launched or "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
