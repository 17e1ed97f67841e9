"""Grids of images: samples during training, made by all processes together, and real images to compare them with."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from ..config.training import TrainConfig
from ..data.dataset import Images
from ..data.pictures import image_grid, to_pil
from ..data.pixels import normalize, to_uint8
from ..sampling.generate import sample_in_lockstep
from .network import ema_weights
from .state import Run


def sample_grids(run: Run, check: Callable[[], None]) -> dict[str, Image.Image]:
    """Grids by name: `test_samples` of the weights that are exported, and with an EMA `test_samples_raw` too.

    All processes must call it; all of them get the grids.

    Args:
        check: is called in every sampling step, equally often by all processes, and may raise.
    """
    with ema_weights(run.ema, run.unet):
        grids = {"test_samples": _sample_grid(run, check)}
    if run.ema is not None:
        grids["test_samples_raw"] = _sample_grid(run, check)
    return grids


def _sample_grid(run: Run, check: Callable[[], None]) -> Image.Image:
    classes = run.network.config.num_class_embeds
    pixels = sample_in_lockstep(
        run.pipeline(),
        run.config.eval_batch_size,
        run.config.seed,
        run.plan.inference_batch,
        class_labels=range(classes - 1) if classes else None,
        show_progress=True,
        on_step=check,
        num_inference_steps=run.config.ddpm_num_inference_steps,
    )
    return image_grid(to_pil(pixels))


def real_grid(images: Images, config: TrainConfig) -> Image.Image:
    """As many images of the training set as a grid of samples has."""
    return image_grid(to_pil(to_uint8(normalize(images.sample(config.eval_batch_size, config.seed)))))
