"""`train(config)`: Algorithm 1 of arXiv 2006.11239, from images to a saved pipeline.

Randomness is a function of progress: what happens in update `step` follows from (seed, step, part of the batch). All
that has to be kept to go on is weights, optimizer, EMA and counts.
"""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..config.training import TrainConfig
from ..data.dataset import Batch, load_images
from ..data.pictures import image_grid, to_pil
from ..data.pixels import normalize, random_flip, to_uint8
from ..diffusion.ddpm_process import DDPMProcess
from ..diffusion.pipeline import DDPMPipelineCustom
from ..storage.checkpoint import best_step, save_checkpoint
from ..storage.files import lock_output_dir
from .interruption import Interrupted, Interruption
from .log import LOG_EVERY, TrainingLog
from .losses import detach_mean, l_simple, loss_weight, target, vlb
from .network import build_ema, build_unet
from .output_folder import clear_output_dir, replace_pipeline
from .plots import save_loss_curve, save_side_by_side
from .previews import sample_grids
from .publishing import calibrate_export, card_facts, publish, pushing
from .setup import dry_run_report, prepare
from .state import Run, capture, exported_network, restore
from .validation import Validation, describe_best
from .validation_set import make_validation_set


def train(config: TrainConfig) -> Path:
    """Train a DDPM; leave in `output_dir` the pipeline, samples beside real images, the loss curve and logs.

    Returns:
        The output folder.

    Raises:
        ValueError: before anything is written, for what can't work.
        OSError: where a checkpoint can't be written; earlier ones are unharmed.
        FloatingPointError: after too many updates without a finite gradient.
        Interrupted: after SIGTERM or Ctrl-C, when a checkpoint is saved.
    """
    # 1. Set-up: what can be wrong is found here, before anything is decoded or written
    started = time.monotonic()
    output_dir = Path(config.output_dir)
    setup = prepare(config)
    accelerator, agreement, plan = setup.accelerator, setup.agreement, setup.plan
    say, is_main = accelerator.print, accelerator.is_main_process
    say("\n".join([*setup.notes, plan.describe(setup.source.name, setup.num_parameters, accelerator.device)]))
    if config.dry_run:
        say(dry_run_report(config, setup))
        return output_dir
    with agreement.together():
        lock = lock_output_dir(output_dir) if is_main else None
    images = load_images(config, setup.source, show_progress=is_main)
    validation_set = None
    if config.eval_steps is not None:
        images, validation_set = make_validation_set(config, images, setup.eval_split)
    if images.has_length and len(images) != plan.num_images:  # some can't be read
        plan = replace(plan, num_images=len(images))

    # 2. Network, optimizer and EMA, new or from a checkpoint
    torch.manual_seed(config.seed)
    unet = build_unet(config, images.num_classes)
    if setup.performance.channels_last:
        unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    network: Any = torch.compile(unet, dynamic=False) if setup.performance.compiled else unet  # for the losses alone
    ema = build_ema(config, unet)
    parameters = list(unet.parameters())
    run = Run(config, plan, setup.scheduler, accelerator, agreement, unet, optimizer, ema, images.label_names)
    if setup.checkpoint is not None:
        restore(run, setup.checkpoint)
        say(f"Going on from {setup.checkpoint}.")
    if is_main and (run.step or config.overwrite_output_dir):  # nobody's files are removed unasked
        say("".join(clear_output_dir(output_dir, run.step, config.logging_dir)), end="")
    log = TrainingLog(accelerator, config)
    log.begin(run.step, run.unlogged, images.skipped)
    validation = Validation(run, log, validation_set) if validation_set is not None else None

    # 3. Train: each rank takes every num_processes-th part of the stream of images
    size, rank = config.train_batch_size, accelerator.process_index
    batches = images.batches(run.images_seen + rank * size, size, accelerator.num_processes * size, config.seed)
    bar = tqdm(
        range(run.step, plan.max_steps), "Training", plan.max_steps, initial=run.step, unit="step", disable=not is_main
    )
    with Interruption(agreement) as interruption, pushing(setup.target) as pusher:

        def save_and_report() -> None:
            """Save, push, export, measure and preview, whatever is due after the updates that are done."""
            if plan.checkpoint_due(run.step) or plan.export_due(run.step):
                is_new = save(run, log)
                if is_new and pusher is not None:
                    pusher.submit(output_dir / f"checkpoint-{run.step}", card_facts(run, images.name))
            if plan.export_due(run.step):
                export(run, log)
            if validation is not None and plan.validation_due(run.step) and not log.has_diverged():
                if validation.measure(interruption.check):
                    save(run, log)
                validation.record_best()
            if plan.preview_due(run.step):
                log.pictures(sample_grids(run, interruption.check), run.step)

        try:
            if run.step:  # a run that was killed may not have come to it
                save_and_report()
            for step in bar:
                began = time.perf_counter()
                interruption.check()
                for group in optimizer.param_groups:
                    group["lr"] = plan.learning_rate(step)

                # accumulate gradients
                for micro_step in range(config.gradient_accumulation_steps):
                    waiting = time.perf_counter()
                    batch = next(batches)
                    waited = time.perf_counter() - waiting
                    seed_part(config.seed, step, micro_step * accelerator.num_processes + rank)
                    x_0, labels = augment(batch, config, images.num_classes, accelerator.device)
                    with accelerator.accumulate(unet):
                        losses, t = training_losses(network, run.scheduler.process, x_0, labels, config)
                        accelerator.backward(losses.mean())
                    log.add_losses(losses, t, waited)

                # update weights, unless the gradient is not finite, and after them the EMA
                grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                log.add_gradient(skip_unless_finite(optimizer, grad_norm, accelerator))
                optimizer.step()
                optimizer.zero_grad()
                if run.ema is not None:
                    run.ema.step(parameters)
                run.step, run.images_seen = step + 1, run.images_seen + plan.global_batch
                run.seconds += time.perf_counter() - began

                # log, keep, show
                if run.step % LOG_EVERY == 0 or run.step == plan.max_steps:
                    decay = {} if run.ema is None else {"ema_decay": run.ema.cur_decay_value}
                    log.write(bar, run.step, lr=plan.learning_rate(step), grad_norm=grad_norm, **decay)
                with log.pause():
                    save_and_report()
            if config.load_best_model_at_end and best_step(output_dir) is not None:
                restore(run, output_dir / f"checkpoint-{best_step(output_dir)}")
                export(run, log)
            grids = sample_grids(run, interruption.check)
            log.pictures(grids, run.step)
        except Interrupted:
            bar.close()
            save(run, log)
            say(f"Stopped after {run.step:,} updates. Go on with --resume_from_checkpoint latest.")
            accelerator.end_training()
            raise

    # 4. Calibration, samples beside real images, the loss curve and the card
    calibrate_export(run, images)
    if is_main:
        real = image_grid(to_pil(to_uint8(normalize(images.sample(config.eval_batch_size, config.seed)))))
        grids["test_samples"].save(output_dir / "samples.png")
        real.save(output_dir / "real.png")
        save_side_by_side(grids["test_samples"], real, output_dir / "samples_and_real.png")
        save_loss_curve(*log.curve(), output_dir / "loss.png")
        publish(run, images.name, setup.target)
    accelerator.end_training()
    if lock is not None:
        lock.release()
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    best = f"  best      {describe_best(output_dir)}\n" if validation is not None else ""
    say(
        f"\nDone: {plan.max_steps:,} updates, {minutes} min {seconds:02d} s in all.\n"
        f"  pipeline  {output_dir}{os.sep}\n"
        f"  card      {output_dir / 'README.md'}\n"
        f"  samples   {output_dir / 'samples_and_real.png'}\n"
        f"  loss      {output_dir / 'loss.png'}\n"
        f"{best}"
        f"Sample more with:\n  ddpm-hf sample {shlex.quote(str(output_dir))} --num_images 64 --seed 1 --output_dir out/"
    )
    return output_dir


# --- one update ----------------------------------------------------------------------------------------------------


def seed_part(seed: int, step: int, part: int) -> None:
    """Make every random number from here on a function of progress: flips, t, ε, label dropout and dropout.

    Parts of the batch are counted over processes and micro-steps alike, so that two processes draw what one process
    draws that accumulates twice as often.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0]) >> 1)


def augment(
    batch: Batch, config: TrainConfig, num_classes: int | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """x_0 in [-1, 1], (B, C, H, W), flipped at random if wanted, and labels, of which some are dropped, (B,)."""
    x_0 = normalize(to_device(batch.pixels, device))
    if config.random_flip:
        x_0 = random_flip(x_0)
    if batch.labels is None or num_classes is None:
        return x_0, None
    labels = to_device(batch.labels, device)
    is_dropped = torch.rand(len(labels), device=device) < config.label_dropout
    return x_0, labels.masked_fill(is_dropped, num_classes)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; a GPU copies them while the CPU goes on, which needs pinned memory."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def training_losses(
    unet: torch.nn.Module, process: DDPMProcess, x_0: Tensor, labels: Tensor | None, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: draw t and ε, noise the images, and compare the prediction with what it should be.

    Returns:
        The loss of each image, float32 of shape (B,), and its t.
    """
    t = torch.randint(process.num_train_timesteps, (len(x_0),), device=x_0.device)
    noise = torch.randn_like(x_0)
    x_t = process.q_sample(x_0, t, noise)
    output = unet(x_t, t, **({} if labels is None else {"class_labels": labels})).sample.float()

    prediction_type, variance_type = config.prediction_type, config.variance_type
    losses = torch.zeros(len(x_0), device=x_0.device)
    if config.objective != "vlb":
        prediction = output[:, : x_0.shape[1]]
        weight = loss_weight(
            process, t, prediction_type, config.weighting,
            snr_gamma=config.snr_gamma or 5.0, p2_gamma=config.p2_gamma, p2_k=config.p2_k,
        )  # fmt: skip
        losses = weight * l_simple(prediction, target(process, x_0, noise, t, prediction_type))
    if config.objective != "simple":
        hybrid = config.objective == "hybrid"
        bound = vlb(
            process, detach_mean(output, x_t) if hybrid else output, x_0, x_t, t, prediction_type, variance_type
        )
        losses = losses + (config.vlb_weight if hybrid else 1.0) * bound
    return losses, t


def skip_unless_finite(optimizer: torch.optim.Optimizer, grad_norm: Tensor, accelerator: Accelerator) -> Tensor:
    """Make the next optimizer step do nothing if the gradient is not finite, without waiting for the device.

    The fused AdamW takes such a flag, which is how loss scalers skip their overflows; with fp16 the scaler sets it.
    """
    is_finite = torch.as_tensor(grad_norm, device=accelerator.device).isfinite()
    if accelerator.scaler is None:
        optimizer.optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    return is_finite


# --- what is written ------------------------------------------------------------------------------------------------


def save(run: Run, log: TrainingLog) -> bool:
    """Write `checkpoint-<step>`, unless it is there. All processes must call it, and all raise if it fails.

    While gradients are not finite nothing is written: the weights may be spoilt already, and good checkpoints would go.
    """
    if run.step == run.saved_step or log.has_diverged():
        return False
    run.unlogged = log.unlogged()
    state, unet = capture(run)
    with run.agreement.together():
        if unet is not None:
            pipeline = DDPMPipelineCustom(unet, run.scheduler)
            save_checkpoint(Path(run.config.output_dir), pipeline, state, run.config.checkpoints_total_limit)
    run.saved_step = run.step
    return True


def export(run: Run, log: TrainingLog) -> None:
    """Write the pipeline into the output folder. All processes must call it, and all raise if it fails."""
    if log.has_diverged():
        return
    unet = exported_network(run)
    with run.agreement.together():
        if unet is not None:
            replace_pipeline(DDPMPipelineCustom(unet, run.scheduler), Path(run.config.output_dir))
