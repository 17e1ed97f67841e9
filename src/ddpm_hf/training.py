"""`train(config)`: Algorithm 1 of arXiv 2006.11239, from images to a saved pipeline.

Randomness is a function of progress: what happens in update `step` follows from (seed, step, micro-step, rank). All
that has to be kept to go on is weights, optimizer, EMA and the number of updates done.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import TrainingState, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .data import Images, load_images, random_flip, to_uint8, to_unit_range
from .ddpm_process import DDPMProcess
from .objectives import l_simple, min_snr_weight, target
from .pictures import check_plotting, image_grid, save_loss_curve, save_side_by_side, to_pil
from .pipeline import DDPMPipelineCustom
from .run_folder import TrainingLog, clear_output_dir, prepare_output_dir
from .sampling import sample_images
from .scheduling_ddpm_custom import DDPMSchedulerCustom

LOG_EVERY = 10  # updates
ADAM_OPTIONS = ("lr", "betas", "weight_decay", "eps")

# Options that a resumed run must share with its checkpoint, and those whose change is not worth a word.
MODEL_OPTIONS = (
    "unet", "model_config_name_or_path", "resolution", "channels", "prediction_type", "ddpm_num_steps",
    "ddpm_beta_schedule", "use_ema",
)  # fmt: skip
FREE_TO_CHANGE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")

# The network of diffusers' train_unconditional.py, for who names no other.
STOCK_UNET = {
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}


def train(config: TrainConfig) -> Path:
    """Train a DDPM; leave in `output_dir` the pipeline, samples beside real images, the loss curve and logs.

    Returns:
        The output folder.

    Raises:
        ValueError: before anything is written, for what can't work.
    """
    started = time.monotonic()
    # 1. Set-up: processes, folder, data, network
    output_dir = Path(config.output_dir)
    resume_from, skipped = prepare_output_dir(output_dir, config)
    check_plotting()
    check_logger(config.logger)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.logger == "none" else config.logger,
        project_dir=str(output_dir / config.logging_dir),
    )
    use_all_cores(accelerator)
    say = accelerator.print
    scheduler = DDPMSchedulerCustom(
        config.ddpm_num_steps,
        beta_schedule=config.ddpm_beta_schedule,
        prediction_type=config.prediction_type,
        variance_type=config.variance_type,
        timestep_spacing=config.timestep_spacing,
    )
    torch.manual_seed(config.seed)
    unet = build_unet(config)
    images = load_images(config, show_progress=accelerator.is_main_process)
    global_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
    max_steps = config.max_train_steps or math.ceil(config.num_epochs * len(images) / global_batch)
    number = f"{len(images):,} images" if images.has_length else "A stream of images"
    say(
        f"{number} of {images.source} at {config.resolution}×{config.resolution}, network of "
        f"{unet.num_parameters():,} parameters, {max_steps:,} updates of {global_batch} images on "
        f"{accelerator.num_processes} × {accelerator.device.type}."
    )
    if config.lr_warmup_steps >= max_steps:
        say(f"Note: the warm-up of {config.lr_warmup_steps} updates is longer than the run: lower --lr_warmup_steps.")

    # 2. Optimizer and EMA
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    raw_unet: UNet2DModel = accelerator.unwrap_model(unet, keep_torch_compile=False)
    ema = (
        EMAModel(
            raw_unet.parameters(),
            decay=config.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=config.ema_inv_gamma,
            power=config.ema_power,
            foreach=True,
        )
        if config.use_ema
        else None
    )
    start = 0
    if resume_from is not None:
        start, notes = restore(resume_from, raw_unet, optimizer, ema, config, max_steps)
        say("\n".join([*skipped, *notes, f"Going on from {resume_from}."]))
    is_main = accelerator.is_main_process
    if is_main and (start or config.overwrite_output_dir):  # nobody's files are removed unasked
        clear_output_dir(output_dir, start, config.logging_dir)
    log = TrainingLog(accelerator, output_dir / config.logging_dir, config, start)

    # 3. Train
    bar = tqdm(range(start, max_steps), "Training", max_steps, initial=start, unit="step", disable=not is_main)
    for step in bar:
        # accumulate gradients
        for micro_step in range(config.gradient_accumulation_steps):
            seed_step(config.seed, step, micro_step, accelerator.process_index)
            is_last = micro_step == config.gradient_accumulation_steps - 1
            with nullcontext() if is_last else accelerator.no_sync(unet):
                x_0 = local_batch(images, config, accelerator, step, micro_step)
                loss = training_loss(unet, scheduler.process, x_0, config)
                accelerator.backward(loss / config.gradient_accumulation_steps)
            log.add_loss(loss)

        # update weights
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, max_steps, config)
        grad_norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # update EMA, after the weights
        if ema is not None:
            ema.step(raw_unet.parameters())

        done = step + 1
        checkpoint_due = done % config.checkpointing_steps == 0 or done == max_steps
        if done % LOG_EVERY == 0 or checkpoint_due:
            log.write(
                bar,
                step=done,
                lr=learning_rate(step, max_steps, config),
                grad_norm=float(grad_norm),
                ema_decay=ema.cur_decay_value if ema is not None else 0.0,
            )
        if checkpoint_due:
            if is_main:
                with ema_weights(ema, raw_unet):
                    pipeline = DDPMPipelineCustom(raw_unet, scheduler)
                    state = training_state(done, raw_unet, optimizer, ema, config)
                    save_checkpoint(output_dir, pipeline, state, config.checkpoints_total_limit)
            accelerator.wait_for_everyone()
        if config.save_images_steps and done % config.save_images_steps == 0 and done < max_steps:
            with ema_weights(ema, raw_unet):
                log.pictures(sample_grid(raw_unet, scheduler, config, accelerator), done)

    # 4. Export: the EMA weights, samples beside real images, the loss curve
    with ema_weights(ema, raw_unet):
        if is_main:
            DDPMPipelineCustom(raw_unet, scheduler).save_pretrained(output_dir)
            samples = sample_grid(raw_unet, scheduler, config, accelerator)
            real = image_grid(to_pil(to_uint8(to_unit_range(images.sample(config.eval_batch_size, config.seed)))))
            samples.save(output_dir / "samples.png")
            real.save(output_dir / "real.png")
            save_side_by_side(samples, real, output_dir / "samples_and_real.png")
            save_loss_curve(*log.curve(), output_dir / "loss.png")
            log.pictures(samples, max_steps)
    accelerator.end_training()
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    say(
        f"\nDone: {max_steps:,} updates, {minutes} min {seconds:02d} s in all.\n"
        f"  pipeline  {output_dir}{os.sep}\n"
        f"  samples   {output_dir / 'samples_and_real.png'}\n"
        f"  loss      {output_dir / 'loss.png'}\n"
        f"Sample more with:\n  ddpm-hf sample {shlex.quote(str(output_dir))} --num_images 64 --seed 1 --output_dir out/"
    )
    return output_dir


# --- one update ----------------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Make every random number from here on a function of progress: t, ε, flips and dropout."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro_step, rank]).generate_state(1, np.uint64)[0]) >> 1)


def local_batch(images: Images, config: TrainConfig, accelerator: Accelerator, step: int, micro_step: int) -> Tensor:
    """x_0 of this process: its share of the next images of the stream, (B, C, H, W) in [-1, 1] on its device."""
    size, processes = config.train_batch_size, accelerator.num_processes
    first = ((step * config.gradient_accumulation_steps + micro_step) * processes + accelerator.process_index) * size
    batch = next(images.batches(first, size, size, config.seed))
    x_0 = to_unit_range(batch.pixels.to(accelerator.device))
    return random_flip(x_0) if config.random_flip else x_0


def training_loss(unet: torch.nn.Module, process: DDPMProcess, x_0: Tensor, config: TrainConfig) -> Tensor:
    """Algorithm 1: draw t and ε, noise the images, and compare the prediction with what it should be (Eq. 14)."""
    t = torch.randint(process.num_train_timesteps, (len(x_0),), device=x_0.device)
    noise = torch.randn_like(x_0)
    prediction = unet(process.q_sample(x_0, t, noise), t).sample
    weight = min_snr_weight(process, t, config.prediction_type, config.snr_gamma) if config.snr_gamma else None
    return l_simple(prediction, target(process, x_0, noise, t, config.prediction_type), weight).mean()


def learning_rate(step: int, max_steps: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (from 0), a function of the number of updates alone."""
    # 1. linear warm-up, which ends at the peak
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    # 2. constant, or down to 0 at the end
    progress = (step - config.lr_warmup_steps) / max(1, max_steps - config.lr_warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * factor[config.lr_scheduler]


@contextmanager
def ema_weights(ema: EMAModel | None, unet: UNet2DModel) -> Iterator[None]:
    """The EMA weights in the network, and the raw ones back whatever happens."""
    if ema is None:
        yield
        return
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        ema.restore(unet.parameters())


# --- state and pictures --------------------------------------------------------------------------------------------


def build_unet(config: TrainConfig) -> UNet2DModel:
    """The network of a configuration, for its resolution and channels.

    Raises:
        ValueError: where the configuration does not describe a network for these images.
    """
    sizes = {"sample_size": config.resolution, "in_channels": config.channels, "out_channels": config.channels}
    if config.model_config_name_or_path is not None:
        arguments = dict(UNet2DModel.load_config(config.model_config_name_or_path))
    else:
        arguments = {**config.unet} if isinstance(config.unet, dict) else STOCK_UNET
        known = inspect.signature(UNet2DModel.__init__).parameters
        unknown = sorted(str(k) for k in arguments if k not in known)
        if unknown:
            raise ValueError(f"`unet` has {', '.join(unknown)}, which UNet2DModel does not know.")
    if arguments.get("num_class_embeds") is not None:
        raise ValueError("`unet` has num_class_embeds, but this script trains unconditional models: leave it out.")
    try:
        unet = UNet2DModel.from_config({**arguments, **sizes})
    except (TypeError, ValueError) as error:
        raise ValueError(f"these options make no UNet2DModel: {error}") from error
    halvings = len(unet.config.block_out_channels) - 1
    if config.resolution % 2**halvings:
        raise ValueError(
            f"`resolution` is {config.resolution}, but the network halves it {halvings} times: use a multiple of "
            f"{2**halvings}."
        )
    return unet


def training_state(
    step: int, unet: UNet2DModel, optimizer: torch.optim.Optimizer, ema: EMAModel | None, config: TrainConfig
) -> TrainingState:
    """What a checkpoint holds. Call it inside `ema_weights`: the raw weights are those that `ema` has stored."""
    names = [name for name, _ in unet.named_parameters()]
    raw = ema.temp_stored_params if ema is not None else list(unet.parameters())
    shadow = dict(zip(names, ema.shadow_params, strict=True)) if ema is not None else None
    return TrainingState(step, dict(zip(names, raw, strict=True)), optimizer.state_dict(), shadow, asdict(config))


def restore(
    folder: Path,
    unet: UNet2DModel,
    optimizer: torch.optim.Optimizer,
    ema: EMAModel | None,
    config: TrainConfig,
    max_steps: int,
) -> tuple[int, list[str]]:
    """Load a checkpoint into the parts of a run.

    Returns:
        The number of updates done, and a line about each option that has changed since.

    Raises:
        ValueError: where an option has changed that makes it another model, or where no update is left to do.
    """
    state = load_checkpoint(folder)
    before, now = state.config, json.loads(json.dumps(asdict(config)))
    changed = [k for k in now if k not in FREE_TO_CHANGE and before.get(k) != now[k]]
    fatal = [k for k in changed if k in MODEL_OPTIONS]
    if fatal:
        found = "; ".join(f"`{k}` is {now[k]!r}, but was {before.get(k)!r}" for k in fatal)
        raise ValueError(f"{folder} is of another model: {found}. Resume with the same options.")
    if state.step > max_steps:
        raise ValueError(f"{folder} has {state.step} updates behind it, but the run has {max_steps}: raise the number.")
    unet.load_state_dict(state.weights)
    adam = [{k: v for k, v in group.items() if k in ADAM_OPTIONS} for group in optimizer.param_groups]
    optimizer.load_state_dict(state.optimizer)
    for group, options in zip(optimizer.param_groups, adam, strict=True):
        group.update(options)
    if ema is not None and state.ema is not None:
        device = next(unet.parameters()).device
        ema.shadow_params = [state.ema[name].to(device) for name, _ in unet.named_parameters()]
        ema.optimization_step = state.step
    return state.step, [f"Changed: {k} is {now[k]!r}, was {before.get(k)!r}." for k in changed]


def sample_grid(
    unet: UNet2DModel, scheduler: DDPMSchedulerCustom, config: TrainConfig, accelerator: Accelerator
) -> Image.Image:
    """A grid of `eval_batch_size` samples of the weights that the network has now."""
    unet.eval()
    batches = sample_images(
        DDPMPipelineCustom(unet, DDPMSchedulerCustom.from_config(scheduler.config)),
        config.eval_batch_size,
        config.seed,
        batch_size=min(config.eval_batch_size, 64),
        num_inference_steps=config.ddpm_num_inference_steps,
        show_progress=accelerator.is_main_process,
    )
    images = [image for batch in batches for image in batch]
    unet.train()
    return image_grid(images)


def check_logger(logger: str) -> None:
    """Raise a ValueError unless the tracker's package is there: Accelerate would go on without it."""
    if logger != "none" and importlib.util.find_spec(logger) is None:
        raise ValueError(f"`logger` is {logger!r}, but it is not installed: pip install {logger}.")


def use_all_cores(accelerator: Accelerator) -> None:
    """On a CPU, share the cores among the processes: `accelerate launch` would leave each of them one thread.

    Without the launcher, OMP_NUM_THREADS is the user's own and stays.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if accelerator.device.type == "cpu" and (launched or "OMP_NUM_THREADS" not in os.environ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // accelerator.num_processes))
