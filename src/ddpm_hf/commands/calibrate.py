"""`ddpm-hf calibrate`."""

from __future__ import annotations

from pathlib import Path

from ..config.commands import CalibrateConfig
from .model import load_on_device, processes


def calibrate(model: str, config: CalibrateConfig) -> Path:
    """Calibrate a model on images and save it; returns its folder."""
    from ..data.dataset import load_images
    from ..data.sources import open_source
    from ..evaluation.calibration import calibrate as measure
    from ..evaluation.calibration import save_calibrated, steps_table
    from ..evaluation.real_images import image_notes, labels_of_network, loading_config
    from ..evaluation.results import choose_output_dir
    from ..sampling.batch_size import out_of_memory_explained
    from ..sharing.card import write_card

    folder = choose_output_dir(model, config.output_dir)
    state = processes()
    pipeline = load_on_device(model, config.revision, config.device)
    loading = loading_config(pipeline.unet, config, config.seed)
    source = open_source(loading)
    images = load_images(loading, source, show_progress=state.is_main_process)
    for note in image_notes(source, loading) if state.is_main_process else ():
        print(f"Note: {note}.", flush=True)
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
            class_labels=labels_of_network(batch.labels, images.label_names, pipeline.unet),
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
