"""What a training run shares: a calibrated model, its card, and pushes to the Hub that never slow it down or end it."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from ..config.training import TrainConfig
from ..data.dataset import Images
from ..data.pixels import normalize, to_uint8
from ..data.sources import public_name
from ..evaluation.calibration import calibrate
from ..sharing.background_push import BackgroundPusher
from ..sharing.card import CardFacts, write_card
from ..sharing.hub import HubTarget, check_push_access
from ..sharing.push import try_push
from ..storage.files import write_text_atomically
from .network import ema_weights
from .state import Run


def check_target(config: TrainConfig) -> HubTarget | None:
    """Where a run pushes to: a repository, by its full name, that accepts pushes with this token. None without a push.

    Raises:
        ValueError: for a name or a token that the Hub does not accept.
        OSError: if the Hub can't be reached.
    """
    if not config.push_to_hub:
        return None
    name = config.hub_model_id or Path(config.output_dir).absolute().name
    target = HubTarget(
        name,
        token=config.hub_token,
        private=config.hub_private_repo,
        share_training_images=config.share_training_images,
    )
    return replace(target, repo_id=check_push_access(target))


def pushing(target: HubTarget | None) -> AbstractContextManager[BackgroundPusher | None]:
    """A pusher of checkpoints for the duration of the training loop, or None without a target."""
    return BackgroundPusher(target) if target is not None else nullcontext()


def card_facts(run: Run) -> CardFacts:
    """What the card of a run's model reports."""
    name, hub_id = public_name(run.config, run.dataset)
    count = f", {run.plan.num_images:,} images" if run.plan.num_images else ""
    return CardFacts(
        dataset=f"{name}{count}",
        dataset_ids=() if hub_id is None else (hub_id,),
        options=run.config.public(),
        updates=run.step,
        images_seen=run.images_seen,
        seconds=run.seconds,
        hardware=f"{run.plan.num_processes} × {_device_name(run.accelerator.device)}",
        copies=run.copies or None,
    )


def calibrate_export(run: Run, images: Images, updates: int) -> None:
    """Calibrate the exported pipeline for few steps, if the plan says so. All processes must call it.

    Args:
        updates: after which the run ended, in the main process: the exported weights may be earlier ones.
    """
    count = run.agreement.from_main(run.plan.calibration_images(updates))
    if run.clock is not None:  # as many as there is time for
        affordable = run.clock.calibration_images(run.config.ddpm_num_steps, run.plan.num_processes)
        wanted = run.config.calibration_images
        count = run.agreement.from_main(min(affordable, run.plan.num_images or affordable, wanted or affordable))
        count = 0 if wanted == 0 else count
    if not count:
        return
    batch = next(images.batches(0, count, count, run.config.seed))
    pipeline = run.pipeline()
    run.network.eval()
    with ema_weights(run.ema, run.unet):
        calibrate(pipeline, to_uint8(normalize(batch.pixels)), class_labels=batch.labels, seed=run.config.seed)
    if run.accelerator.is_main_process:
        file = Path(run.config.output_dir) / "scheduler" / pipeline.scheduler.config_name
        write_text_atomically(file, pipeline.scheduler.to_json_string())


def publish(run: Run, target: HubTarget | None) -> None:
    """Write the card of the finished pipeline, and push both if there is a target. Failures are printed, not raised."""
    folder, facts = Path(run.config.output_dir), card_facts(run)
    write_card(folder, facts)
    if target is not None:
        try_push(folder, target, facts, log=run.accelerator.print)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()} ({platform.machine()}, {os.cpu_count()} cores)"
