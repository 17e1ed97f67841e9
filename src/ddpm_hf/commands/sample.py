"""`ddpm-hf sample`."""

from __future__ import annotations

from pathlib import Path

from ..config.commands import SampleConfig
from .model import load_on_device, processes


def sample(model: str, config: SampleConfig) -> Path:
    """Fill the output folder with images and `grid.png`, with all processes; returns the folder."""
    from ..sampling.batch_size import fitting_batch_size, out_of_memory_explained
    from ..sampling.files import image_files
    from ..sampling.folder import sample_to_folder
    from ..sampling.generate import check_options, parse_labels
    from ..storage.files import check_writable

    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    state = processes()
    pipeline, call_options = load_on_device(model, config.revision, config.device, config.dtype), config.call_options()
    pipeline.scheduler = config.configure(pipeline.scheduler)
    class_labels = parse_labels(config.class_label, pipeline.unet.config)
    check_options(pipeline, class_labels, **call_options)  # before anything is compiled
    batch_size = config.batch_size or fitting_batch_size(pipeline.unet)
    if config.fast:
        missing = config.num_images - len(image_files(output_dir, config.format).existing())
        share = max(missing // state.num_processes, 1)
        rows = min(batch_size, config.num_images)
        described = pipeline.enable_fast_sampling(share, config.num_inference_steps, rows, config.guidance_scale)
        if state.is_main_process:
            print(f"Fast sampling: {described}.")
    with out_of_memory_explained(
        f"`batch_size` is {batch_size}: pass a smaller --batch_size. What was made before is kept."
    ):
        made = sample_to_folder(
            pipeline,
            output_dir,
            config.num_images,
            config.seed,
            batch_size,
            format=config.format,
            class_labels=class_labels,
            **call_options,
        )
    if state.is_main_process:
        earlier = config.num_images - made
        print(f"Images in {output_dir}/: {made} new, {earlier} from before.")
    return output_dir
