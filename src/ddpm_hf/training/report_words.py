"""What the page of a run says of it, in words for a reader who knows nothing of diffusion."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..data.sources import public_name
from .output_folder import RECIPE
from .state import Run


def state(run: Run, done: int, seconds: float) -> str:
    """What the run is doing.

    Args:
        done: updates since it was started or resumed, which took `seconds`.
    """
    left, is_timed = run.plan.max_steps - run.step, run.clock is not None
    if done and not left:
        return (
            f"All {run.step:,} updates are done. What is left: steps of sampling are chosen, and the card is written."
        )
    text = f"Running: {run.step:,} of {'about ' if is_timed else ''}{run.plan.max_steps:,} updates are done."
    if done:
        remaining = seconds / done * left if run.clock is None else run.clock.left()
        text += f" About {duration(remaining)} left, at {run.images_seen / run.seconds:,.0f} images per second."
    return text


def copies_in_words(count: int, samples: int) -> str:
    """How many of the samples are copies."""
    return f"{count:,} of {samples:,} samples copy a training image"


def explanation(run: Run) -> list[str]:
    """What is trained, on what: a paragraph each."""
    config, plan = run.config, run.plan
    name, _ = public_name(config, run.dataset)
    count = f"{plan.num_images:,} images" if plan.num_images else "a stream of images"
    length = f"in {plan.max_steps:,} updates" if run.clock is None else f"for {config.time_budget}, in updates"
    color = {1: "in shades of grey", 3: "in colour"}.get(config.channels or 3, "with transparency")
    texts = [
        f"A network learns to draw images like those of {name}: {count}, at {config.resolution}×{config.resolution} "
        f"pixels, {color}. It is shown these images under more or less noise, and learns to tell the image from the "
        f"noise. To draw, it starts from nothing but noise and removes it in "
        f"{config.ddpm_num_inference_steps:,} steps: other noise becomes another image.",
        f"It learns {length}, each of which shows it {plan.global_batch:,} images and corrects it a little"
        + (
            f": {plan.max_steps * plan.global_batch / plan.num_images:,.1f} passes over the images."
            if plan.num_images and run.clock is None
            else "."
        ),
    ]
    if run.num_classes:
        texts.append(f"It learns {run.num_classes:,} classes, and draws the one that it is told to.")
    if run.ema is not None:
        texts.append("What is kept is an average of its weights over the latest updates, which draws better than they.")
    return texts


def facts(run: Run, reasons: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Names and values of the training.

    Args:
        reasons: of its plan, which say more of the same.
    """
    config, plan = run.config, run.plan
    held_out = f"{config.eval_images:,} images, every {config.eval_steps:,} updates" if config.eval_steps else "none"
    planned = [(name.capitalize(), text) for name, text in reasons if name != "output"]  # a path of this machine
    known = [
        ("Network", f"{run.network.num_parameters():,} parameters (the numbers that it learns)"),
        (
            "Predicts",
            {"epsilon": "the noise", "sample": "the image"}.get(config.prediction_type, "a mixture of image and noise"),
        ),
        ("Learning rate", f"{config.learning_rate:g} at its peak, {config.lr_scheduler.replace('_', ' ')}"),
        ("Held out", held_out),
        ("Computed on", f"{plan.num_processes} × {run.accelerator.device.type}"),
        ("All options", f"{RECIPE if run.clock else f'{config.logging_dir}/config.json'}, beside this page"),
    ]
    return planned + [fact for fact in known if fact[0] not in dict(planned)]


def duration(seconds: float) -> str:
    """A duration for people, of one or two units."""
    if seconds < 60:
        return "less than a minute"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
