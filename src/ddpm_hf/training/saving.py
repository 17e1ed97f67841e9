"""What a run saves, by all processes together: checkpoints, and the pipeline in the output folder."""

from __future__ import annotations

from pathlib import Path

from ..diffusion.pipeline import DDPMPipelineCustom
from ..storage.checkpoint import best_step, save_checkpoint
from .log import TrainingLog
from .output_folder import replace_pipeline
from .state import Run, capture, exported_network, restore


def save(run: Run, log: TrainingLog) -> bool:
    """Write `checkpoint-<step>`, unless it exists. All processes must call it, and all raise if it fails.

    While gradients are not finite nothing is written: the weights may be damaged already, and good checkpoints would be
    deleted.

    Returns:
        Whether it was written.
    """
    if run.step == run.saved_step:
        return False
    if log.has_diverged():
        run.accelerator.print(f"No checkpoint after update {run.step}: its gradient was not finite.")
        return False
    run.unlogged = log.unlogged()
    state, unet = capture(run)
    with run.agreement.together():
        if unet is not None:
            pipeline = DDPMPipelineCustom(unet, run.scheduler)
            save_checkpoint(Path(run.config.output_dir), pipeline, state, run.config.checkpoints_total_limit or 0)
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


def export_best(run: Run, log: TrainingLog) -> None:
    """Return to the best checkpoint, if validation has found one, and export it. All processes must call it."""
    output_dir = Path(run.config.output_dir)
    best = run.agreement.from_main(best_step(output_dir))  # others may not see the folder
    if best is not None:
        restore(run, output_dir / f"checkpoint-{best}")
        export(run, log)
