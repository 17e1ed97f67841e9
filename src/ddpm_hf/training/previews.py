"""Samples during training, made by all processes together."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..sampling.generate import sample_in_lockstep
from .network import ema_weights
from .state import Run


def sample_previews(run: Run, check: Callable[[], None]) -> dict[str, Tensor]:
    """Samples by name: `test_samples` of the weights that are exported, and with an EMA `test_samples_raw` too.

    With a time budget, the latter's time is better spent on training.

    All processes must call it; all of them get the samples, uint8 of shape (N, C, H, W) on the CPU.

    Args:
        check: is called in every sampling step, equally often by all processes, and may raise.
    """
    with ema_weights(run.ema, run.unet):
        samples = {"test_samples": _sample(run, check)}
    if run.ema is not None and run.clock is None:
        samples["test_samples_raw"] = _sample(run, check)
    return samples


def _sample(run: Run, check: Callable[[], None]) -> Tensor:
    classes = run.network.config.num_class_embeds
    return sample_in_lockstep(
        run.pipeline(),
        run.config.eval_batch_size,
        run.config.seed,
        run.plan.inference_batch,
        class_labels=range(classes - 1) if classes else None,
        show_progress=True,
        on_step=check,
        num_inference_steps=run.config.ddpm_num_inference_steps,
    ).cpu()
