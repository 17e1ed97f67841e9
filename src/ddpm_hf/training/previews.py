"""Sample grids during training, made by all processes together."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from ..data.pictures import image_grid, to_pil
from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..sampling.generate import sample_in_lockstep
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
    pipeline = DDPMPipelineCustom(run.network, DDPMSchedulerCustom.from_config(run.scheduler.config))
    classes = run.network.config.num_class_embeds
    pixels = sample_in_lockstep(
        pipeline,
        run.config.eval_batch_size,
        run.config.seed,
        BATCH_SIZE,
        class_labels=range(classes - 1) if classes else None,
        show_progress=True,
        on_step=check,
        num_inference_steps=run.config.ddpm_num_inference_steps,
    )
    return image_grid(to_pil(pixels))
