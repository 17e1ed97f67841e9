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
    if config.timestep_spacing != "model":
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, timestep_spacing=config.timestep_spacing
        )
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
    ):
        for image in batch:
            image.save(output_dir / f"{len(images):05d}.png")
            images.append(image)
    grid = output_dir / "grid.png"
    image_grid(images[:256]).save(grid)
    print(f"{len(images)} images in {output_dir}/, the first {min(256, len(images))} of them in {grid}.")
    return grid


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
