"""Sample grids during training, made by all processes together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image

from ..data.pictures import image_grid
from ..diffusion.pipeline import DDPMPipelineCustom, DDPMPipelineCustomOutput
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from .network import ema_weights
from .state import Run

BATCH_SIZE = 64


def sample_grids(run: Run, check: Callable[[], None]) -> dict[str, Image.Image]:
    """Grids by name: `test_samples` of the weights that are exported, and with an EMA `test_samples_raw` too.

    All processes must call it; all of them get the grids.

    Args:
        check: is called in every sampling step, by all processes equally often, and may raise.
    """
    with ema_weights(run.ema, run.unet):
        grids = {"test_samples": _sample_grid(run, check)}
    if run.ema is not None:
        grids["test_samples_raw"] = _sample_grid(run, check)
    return grids


def _sample_grid(run: Run, check: Callable[[], None]) -> Image.Image:
    def advance(pipe: object, i: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
        check()
        return tensors

    accelerator, network, config = run.accelerator, run.network, run.config
    rank, processes = accelerator.process_index, accelerator.num_processes
    pipeline = DDPMPipelineCustom(network, DDPMSchedulerCustom.from_config(run.scheduler.config))
    pipeline.set_progress_bar_config(disable=not accelerator.is_main_process, desc="Sampling", leave=False)
    classes = network.config.num_class_embeds
    made: list[tuple[int, np.ndarray]] = []
    network.eval()
    try:
        # Equal numbers of network calls in all processes, so that sharded networks stay in step; doubles are dropped.
        share = [
            (rank + i * processes) % config.eval_batch_size
            for i in range(math.ceil(config.eval_batch_size / processes))
        ]
        for start in range(0, len(share), BATCH_SIZE):
            batch = share[start : start + BATCH_SIZE]
            output = pipeline(
                len(batch),
                [torch.Generator().manual_seed(config.seed + i) for i in batch],
                config.ddpm_num_inference_steps,
                class_labels=[i % (classes - 1) for i in batch] if classes else None,
                callback_on_step_end=advance,
            )
            assert isinstance(output, DDPMPipelineCustomOutput)
            made += [(i, np.asarray(image)) for i, image in zip(batch, output.images, strict=True)]
    finally:
        network.train()
    everyones = dict(gather_object(made) if processes > 1 else made)
    return image_grid([Image.fromarray(everyones[i]) for i in range(config.eval_batch_size)])
