"""`train(config)`: a run from images to a saved pipeline. README.md in this folder is a guided tour.

Randomness is a function of progress (step.py), so that a checkpoint needs only weights, optimizer, EMA and counts.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch.nn.parallel import DistributedDataParallel

from ..config.training import TrainConfig
from ..data.dataset import Images, load_images
from ..data.sources import Source, Stream
from ..diffusion.ddpm_labels import LABEL_NAMES
from ..distributed import lost_processes_raise
from ..sampling.batch_size import out_of_memory_explained
from ..sharing.background_push import BackgroundPusher
from ..storage.checkpoint import FULL_DISK_REMEDY, checkpoint_steps
from ..storage.files import full_disk_explained, lock_output_dir
from .averages import build_averages
from .batch_size import what_to_lower
from .choosing import choose_average
from .copies import open_training_images
from .deadline import TimedPlan
from .interruption import Interrupted, Interruption
from .log import TrainingLog
from .network import build_optimizer, build_unet
from .output_folder import clear_output_dir, write_recipe
from .plan import Plan
from .plots import save_pictures
from .previews import sample_previews
from .publishing import calibrate_export, card_facts, publish, pushing
from .report import Reasons, Report, watching
from .saving import export, export_best, save
from .setup import Setup, check_same_data, dry_run_report, prepare
from .state import Run, restore
from .step import accumulate_gradients, update_ema, update_weights
from .validation import Validation
from .validation_set import make_validation_set


def train(
    config: TrainConfig, started: float | None = None, reasons: Reasons = (), source: Source | Stream | None = None
) -> Path:
    """Train a DDPM; leave in `output_dir` the pipeline, samples beside real images, the loss curve and logs.

    Args:
        started: from when on a time budget counts, on the clock of `time.monotonic`. Default: now.
        reasons: of the plan of a run, for its page.
        source: the images, if they have been opened.

    Returns:
        The output folder.

    Raises:
        ValueError: before anything is written, for what can't work.
        OSError: where a checkpoint can't be written; earlier ones are unharmed.
        FloatingPointError: after too many updates without a finite gradient.
        MemoryError: where a batch does not fit the device, with what to lower.
        Interrupted: after SIGTERM or Ctrl-C, when a checkpoint is saved.
    """
    # What can be wrong is found here, before anything is decoded or written
    setup = prepare(config, started, reasons, source)
    config = setup.config
    setup.accelerator.print("\n".join(setup.notes))
    if config.dry_run:
        setup.accelerator.print(dry_run_report(config, setup))
        return Path(config.output_dir)
    with setup.agreement.together():
        lock = lock_output_dir(Path(config.output_dir), setup.accelerator.is_main_process)
    with (
        lock,
        out_of_memory_explained(what_to_lower(config)),
        full_disk_explained(Path(config.output_dir), remedy=FULL_DISK_REMEDY),
    ):
        train_prepared(config, setup)
    return Path(config.output_dir)


def train_prepared(config: TrainConfig, setup: Setup) -> None:
    """`train`, once everything is checked and the output folder is locked."""
    # 1. Images to train on, and images to measure on
    accelerator = setup.accelerator
    with setup.agreement.together(patiently=True):  # one process of each machine decodes them
        images = load_images(config, setup.source, show_progress=accelerator.is_main_process)
        images, validation_set = make_validation_set(config, images, setup.eval_split)
    check_same_data(setup.agreement, images)
    plan = replace(setup.plan, num_images=len(images)) if images.has_length else setup.plan  # without unreadable ones

    # 2. Network, optimizer and EMA, new or from a checkpoint
    run = build_run(config, setup, plan, images)
    log = TrainingLog(accelerator, config, plan.max_steps)
    with run.agreement.together():
        if accelerator.is_main_process:
            clear_output_dir(config, run.step, log=accelerator.print)
            if run.clock is not None:
                write_recipe(config)
        log.begin(run.step, run.unlogged, images.skipped)
    with run.agreement.together(patiently=True):
        training_images = open_training_images(images, config)
    validation = None if validation_set is None else Validation(run, log, validation_set, training_images)

    # 3. Training
    with watching(run, log, images, training_images, setup.reasons) as report:
        end = train_network(run, setup, images, log, validation, report)

        # 4. The end: calibration, samples beside real images, the loss curve and the card
        calibrate_export(run, images, log.last_step())
        if accelerator.is_main_process:
            save_pictures(Path(config.output_dir), *report.grids(), *log.loss_curve())
            report.write(f"Done: {end}")
            publish(run, setup.target)
            if run.clock is not None:
                write_recipe(config, f"It trained {run.step:,} updates in {run.seconds:,.0f} s.")
    end_training(run)
    if accelerator.is_main_process:
        print(summary(run, validation, report, end, time.monotonic() - setup.started))


def train_network(
    run: Run, setup: Setup, images: Images, log: TrainingLog, validation: Validation | None, report: Report
) -> str:
    """Train until the plan ends or held-out images gain no more, and export and sample the network that is kept.

    Returns:
        How it ended, in a sentence.

    Raises:
        Interrupted: after a signal, when a checkpoint is saved.
    """
    with (
        _naming_the_last_checkpoint(run),
        Interruption(run.agreement) as interruption,
        pushing(setup.target) as pusher,
    ):
        try:
            if run.step:  # an interrupted run may not have come to it
                save_and_report(run, log, validation, pusher, interruption.check, report)
            for _ in updates(run, setup, images, log, validation, interruption):
                with log.pause():
                    if run.step == run.plan.max_steps and run.other_averages and validation is not None:
                        run.accelerator.print(choose_average(run, validation.validation_set))
                    report.look()
                    save_and_report(run, log, validation, pusher, interruption.check, report)
            end = f"{run.plan.max_steps:,} updates."
            is_early = run.step < run.plan.max_steps
            if validation is not None and is_early:
                end = validation.explain_stop()
                log.close()
                save(run, log)
            if validation is not None and (is_early or run.config.load_best_model_at_end):
                is_best_better, reason = validation.choose()
                end = f"{end} {reason}"
                (export_best if is_best_better else export)(run, log)
            with run.measuring("previews"):
                report.show(sample_previews(run, interruption.check))
        except Interrupted:
            log.close()
            save(run, log)
            run.accelerator.print(f"Stopped after {run.step:,} updates. Resume with --resume_from_checkpoint latest.")
            end_training(run)
            raise
    return end


def updates(
    run: Run,
    setup: Setup,
    images: Images,
    log: TrainingLog,
    validation: Validation | None,
    interruption: Interruption,
) -> Iterator[None]:
    """Optimizer updates, one after the other, until the plan ends or held-out images gain no more."""
    network = torch.compile(run.unet, dynamic=False) if setup.performance.compiled else run.unet  # for the losses alone
    # Each rank takes every num_processes-th part of the stream of images.
    size, processes = run.config.batch_size, run.accelerator.num_processes
    first = run.images_seen + run.accelerator.process_index * size
    batches = images.batches(first, size, processes * size, run.config.seed)
    for step in log.bar(run.step):
        if validation is not None and validation.has_stalled():
            return
        began, cpu_began = time.perf_counter(), time.process_time()
        begin_update(run, interruption)
        log.max_steps = run.plan.max_steps
        accumulate_gradients(run, network, batches, log)
        grad_norm = update_weights(run, log)
        update_ema(run)
        run.advance(time.perf_counter() - began, time.process_time() - cpu_began)
        log.write(run.step, lr=run.plan.learning_rate(step), grad_norm=grad_norm, ema_decay=run.ema_decay)
        yield


def begin_update(run: Run, interruption: Interruption) -> None:
    """Raise Interrupted in all processes after a signal; with a time budget, agree on the time that is left."""
    if run.clock is None:
        interruption.check()
    else:
        run.clock.advance(*interruption.check_and_agree(*run.clock.reading()))
        run.plan = cast(TimedPlan, run.plan).at(run.clock, run.step)


@contextmanager
def _naming_the_last_checkpoint(run: Run) -> Iterator[None]:
    """A run that loses a process says where to resume."""
    try:
        with lost_processes_raise():
            yield
    except ConnectionError as error:
        # What the disk has, not what this process counted: it may have ended while others still wrote.
        last = max([run.saved_step, *checkpoint_steps(Path(run.config.output_dir))])
        folder = Path(run.config.output_dir) / f"checkpoint-{last}"
        raise ConnectionError(
            f"{error}. The run ends after {run.step:,} updates; its last checkpoint is "
            f"{folder if last else 'none yet'}. Start it again with --resume_from_checkpoint latest."
        ) from error


def build_run(config: TrainConfig, setup: Setup, plan: Plan, images: Images) -> Run:
    """A run with its network, optimizer and moving average: new, or in the state of the checkpoint to resume from."""
    torch.manual_seed(config.seed)
    unet = build_unet(config, images.num_classes)
    if images.label_names:
        unet.register_to_config(**{LABEL_NAMES: images.label_names})
    if setup.performance.channels_last:
        unet.to(memory_format=torch.channels_last)
    unet, optimizer = setup.accelerator.prepare(unet, build_optimizer(config, unet))
    run = Run(
        config, plan, setup.scheduler, setup.accelerator, setup.agreement, unet, optimizer,
        *build_averages(config, unet), setup.clock, images.label_names, images.name,
    )  # fmt: skip
    if setup.checkpoint is not None:
        restore(run, setup.checkpoint)
        run.accelerator.print(f"Resuming from {setup.checkpoint}.")
    return run


def save_and_report(
    run: Run,
    log: TrainingLog,
    validation: Validation | None,
    pusher: BackgroundPusher | None,
    check: Callable[[], None],
    report: Report,
) -> None:
    """Whatever is due after `run.step` updates: a checkpoint and its push, the export, validation, samples, the page.

    Args:
        check: raises Interrupted in all processes once any of them has received a signal.
    """
    plan, output_dir = run.plan, Path(run.config.output_dir)
    if plan.checkpoint_due(run.step) or plan.export_due(run.step):
        with run.measuring("checkpoint"):
            is_new = save(run, log)
            if plan.export_due(run.step):
                export(run, log)
        if is_new and pusher is not None:
            pusher.submit(output_dir / f"checkpoint-{run.step}", card_facts(run))
    if validation is not None and plan.validation_due(run.step) and not log.has_diverged():
        with run.measuring("validation"):
            is_best = validation.measure(check)
        if is_best:
            save(run, log)
        validation.record_best()
        report.measured()
    if plan.preview_due(run.step):
        with run.measuring("previews"):
            report.show(sample_previews(run, check))


def end_training(run: Run) -> None:
    """End trackers and the process group, once the network is no longer trained.

    The reducer of DDP goes first. As the last owner of the group it would wait for the group's threads while it holds
    Python's lock, which they may need: then a run with everything saved would never end.
    """
    if isinstance(run.unet, DistributedDataParallel):
        del run.unet.reducer, run.unet.logger
    run.accelerator.end_training()


def summary(run: Run, validation: Validation | None, report: Report, end: str, seconds: float) -> str:
    """What a finished run has left, and the next command."""
    output_dir = Path(run.config.output_dir)
    minutes, seconds = divmod(round(seconds), 60)
    best = f"  best      {validation.describe_best()}\n" if validation is not None else ""
    return (
        f"\nDone: {end} {minutes} min {seconds:02d} s in all.\n"
        f"  pipeline  {output_dir}{os.sep}\n"
        f"  card      {output_dir / 'README.md'}\n"
        f"  samples   {output_dir / 'samples_and_real.png'}\n"
        f"  loss      {output_dir / 'loss.png'}\n"
        f"  report    {output_dir / 'report.html'}\n"
        f"{best}{report.summary()}"
        f"Sample more with:\n  ddpm-hf sample {shlex.quote(str(output_dir))} --num_images 64 --seed 1 --output_dir out/"
    )
