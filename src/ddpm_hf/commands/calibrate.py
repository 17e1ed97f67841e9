"""`ddpm-hf calibrate`."""

from __future__ import annotations

from pathlib import Path

from ..config.commands import CalibrateConfig
from .model import load_on_device, processes


def calibrate(model: str, config: CalibrateConfig) -> Path:
    """Calibrate a model on images and save it; returns its folder."""
    from ..data.dataset import load_images
    from ..evaluation.calibration import calibrate as measure
    from ..evaluation.calibration import save_calibrated, steps_table
    from ..evaluation.real_images import loading_config
    from ..evaluation.results import choose_output_dir
    from ..sampling.batch_size import out_of_memory_explained
    from ..sharing.card import write_card

    folder = choose_output_dir(model, config.output_dir)
    state = processes()
    pipeline = load_on_device(model, config.revision, config.device)
    images = load_images(loading_config(pipeline.unet, config, config.seed), show_progress=state.is_main_process)
    count = config.num_images
    if count > len(images):
        raise ValueError(f"`num_images` is {count}, but {images.name} has {len(images)}: lower it.")
    batch = next(images.batches(0, count, count, config.seed))
    with out_of_memory_explained(
        f"`batch_size` is {config.batch_size}: pass a smaller --batch_size. What was made before is kept."
    ):
        calibration = measure(
            pipeline,
            batch.pixels,
            num_images=count,
            seed=config.seed,
            batch_size=config.batch_size,
            class_labels=batch.labels,
        )
    if state.is_main_process:
        save_calibrated(pipeline, folder)
        write_card(folder)
        worst = float((calibration.x_0_error_standard_error / calibration.x_0_error).max())
        print(
            f"{steps_table(pipeline.scheduler)}\nThe standard errors of x̂_0's errors are at most {worst:.1%} of them."
        )
        print(f"The calibrated model is in {folder}/; sample from it with --spacing optimal --variance_type optimal.")
    return folder
