"""The `ddpm-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import HfArgumentParser

from .config import HelpFormatter, SampleConfig, exit_with_error

DESCRIPTION = """\
DDPM (Ho et al. 2020) for the Hugging Face ecosystem.

Train a model with `accelerate launch training/train.py`, then look at what it makes:

  ddpm-hf sample ddpm-digits                                64 images of a model trained here
  ddpm-hf sample ddpm-digits/checkpoint-500                 … of a training checkpoint
  ddpm-hf sample google/ddpm-cifar10-32 --num_images 16     … of a model of the Hub, stock ones included
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; foreseen errors end with one line and status 1."""
    parser = argparse.ArgumentParser(prog="ddpm-hf", description=DESCRIPTION, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True, parser_class=HfArgumentParser
    )
    sample_parser = commands.add_parser(
        "sample",
        dataclass_types=[SampleConfig],
        help="make images: numbered PNGs and a grid",
        description="Make images: numbered PNGs and a grid, the same ones whatever the batch size.",
        usage="ddpm-hf sample MODEL [--OPTION VALUE …]",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    sample_parser.add_argument("model", metavar="MODEL", help="a folder, a training checkpoint, or a model of the Hub")

    options = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    options.pop("command")
    try:
        sample(options.pop("model"), SampleConfig(**options))
    except ValueError as error:
        exit_with_error(error)


def sample(model: str, config: SampleConfig) -> Path:
    """Write `00000.png` … and `grid.png` into the output folder; returns the grid's path."""
    import torch  # these take seconds: --help and mistakes answer at once

    from .pictures import image_grid
    from .run_folder import check_writable
    from .sampling import load_pipeline, sample_images

    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    pipeline = load_pipeline(model, config.revision, getattr(torch, config.dtype)).to(_device(config.device))
    if config.timestep_spacing is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, timestep_spacing=config.timestep_spacing
        )
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
    ):
        for image in batch:
            image.save(output_dir / f"{len(images):05d}.png")
            images.append(image)
    grid = output_dir / "grid.png"
    image_grid(images[:256]).save(grid)
    print(f"{len(images)} images in {output_dir}/, the first {min(256, len(images))} of them in {grid}.")
    return grid


def _device(name: str | None) -> str:
    import torch

    if name is not None:
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
