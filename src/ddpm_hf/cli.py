"""The `ddpm-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from transformers import HfArgumentParser

from .config import CalibrateConfig, HelpFormatter, SampleConfig, TrainConfig, exit_with_error

if TYPE_CHECKING:
    from .pipeline import DDPMPipelineCustom

DESCRIPTION = """\
DDPM (Ho et al. 2020) for the Hugging Face ecosystem.

Train a model with `accelerate launch training/train.py`, then look at what it makes:

  ddpm-hf sample ddpm-digits                                64 images of a model trained here
  ddpm-hf sample ddpm-digits/checkpoint-500                 … of a training checkpoint
  ddpm-hf sample google/ddpm-cifar10-32 --num_images 16     … of a model of the Hub, stock ones included

Good images in few steps, and what the best ones for the likelihood need:

  ddpm-hf sample ddpm-digits --steps 25 --eta 0 --solver_order 2
  ddpm-hf calibrate ddpm-digits --dataset digits            then also --spacing optimal, --variance_type optimal
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; foreseen errors end with one line and status 1."""
    parser = argparse.ArgumentParser(prog="ddpm-hf", description=DESCRIPTION, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True, parser_class=HfArgumentParser
    )
    for name, (_, config, summary, description) in COMMANDS.items():
        command_parser = commands.add_parser(
            name,
            dataclass_types=[config],
            help=summary,
            description=description,
            usage=f"ddpm-hf {name} MODEL [--OPTION VALUE …]",
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        model_help = "a folder, a training checkpoint, or a model of the Hub"
        command_parser.add_argument("model", metavar="MODEL", help=model_help)

    options = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    run, config, *_ = COMMANDS[options.pop("command")]
    try:
        run(options.pop("model"), config(**options))
    except (ValueError, OSError) as error:
        exit_with_error(error)


def sample(model: str, config: SampleConfig) -> Path:
    """Write `00000.png` … and `grid.png` into the output folder; returns the grid's path."""
    import torch  # these take seconds: --help and mistakes answer at once

    from .pictures import image_grid
    from .run_folder import check_writable
    from .sampling import load_pipeline, sample_images

    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    stale = [p for p in output_dir.glob("[0-9]*.png") if p.stem.isdigit() and int(p.stem) >= config.num_images]
    if stale:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {len(stale)} images of a longer run ({min(stale).name} …): remove "
            "them, or choose another --output_dir."
        )
    device = _device(config.device)
    pipeline = load_pipeline(model, config.revision, getattr(torch, config.dtype)).to(device)
    chosen = {"timestep_spacing": config.timestep_spacing, "variance_type": config.variance_type}
    changes = {name: value for name, value in chosen.items() if value != "model"}
    if changes.get("timestep_spacing") == "optimal":  # no spacing that a configuration may hold
        del changes["timestep_spacing"]
    if changes:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    output_dir.mkdir(parents=True, exist_ok=True)
    images: list[Image.Image] = []
    for batch in sample_images(
        pipeline,
        config.num_images,
        config.seed,
        config.batch_size,
        class_labels=config.class_label,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        eta=config.eta,
        solver_order=config.solver_order,
        timesteps="optimal" if config.timestep_spacing == "optimal" else None,
    ):
        for image in batch:
            image.save(output_dir / f"{len(images):05d}.png")
            images.append(image)
    grid = output_dir / "grid.png"
    image_grid(images[:256]).save(grid)
    print(f"{len(images)} images in {output_dir}/, the first {min(256, len(images))} of them in {grid}.")
    return grid


def calibrate(model: str, config: CalibrateConfig) -> Path:
    """Measure a model on images, and save it with what was measured; returns its folder."""
    from accelerate import PartialState

    from .calibration import calibrate as measure
    from .calibration import check_place, save_calibrated, steps_table
    from .data import load_images
    from .sampling import load_pipeline

    place = check_place(model, config.output_dir)
    state = PartialState()
    pipeline = load_pipeline(model, config.revision).to(_device(config.device) if config.device else state.device)
    with state.main_process_first():  # which may fill the cache for the others
        images = load_images(_images_of(pipeline, config), show_progress=state.is_main_process)
    calibration = measure(
        pipeline, images.pixels, num_images=config.num_images, seed=config.seed, batch_size=config.batch_size
    )
    if state.is_main_process:
        save_calibrated(pipeline, place)
        worst = float((calibration.x_0_error_standard_error / calibration.x_0_error).max())
        print(f"{steps_table(pipeline.scheduler)}\nThe errors of x̂_0 are known to {worst:.1%} or better.")
        print(f"The calibrated model is in {place}/; --spacing optimal and --variance_type optimal sample with it.")
    return place


def _images_of(pipeline: DDPMPipelineCustom, config: CalibrateConfig) -> TrainConfig:
    """How to load images for this model."""
    network = pipeline.unet.config
    return TrainConfig(
        dataset_name=config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        train_data_dir=config.train_data_dir,
        cache_dir=config.cache_dir,
        image_column=config.image_column,
        resolution=network.sample_size,
        channels=network.in_channels,
        center_crop=config.center_crop,
        seed=config.seed,
    )


def _device(name: str | None) -> str:
    """The device asked for, if it can hold a tensor; else the best one present."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` is {name!r}, but that can't be used here ({reason}): try --device cpu.") from error
    return name


COMMANDS: dict[str, tuple[Callable[[str, Any], Path], type, str, str]] = {
    "sample": (
        sample,
        SampleConfig,
        "make images: numbered PNGs and a grid",
        "Make images: numbered PNGs and a grid, the same ones whatever the batch size.",
    ),
    "calibrate": (
        calibrate,
        CalibrateConfig,
        "measure a model, for good images in few steps",
        "Measure the error of a model at every timestep, which gives the optimal variance and the best timesteps, and "
        "keep it in the model's scheduler.",
    ),
}
