"""The `ddpm-hf` command."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import HfArgumentParser

from .config import ConvertConfig, HelpFormatter, PushConfig, SampleConfig, exit_with_error

DESCRIPTION = """\
DDPM (Ho et al. 2020) for the Hugging Face ecosystem.

Train a model with `accelerate launch training/train.py`, then look at what it makes:

  ddpm-hf sample ddpm-digits                                64 images of a model trained here
  ddpm-hf sample ddpm-digits/checkpoint-500                 … of a training checkpoint
  ddpm-hf sample google/ddpm-cifar10-32 --num_images 16     … of a model of the Hub, stock ones included

Share it, or turn somebody's model into one that loads three ways:

  ddpm-hf push ddpm-digits me/ddpm-digits --private
  ddpm-hf convert google/ddpm-cifar10-32 my-cifar10
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; foreseen errors end with one line and status 1."""
    parser = argparse.ArgumentParser(prog="ddpm-hf", description=DESCRIPTION, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True, parser_class=HfArgumentParser
    )
    _add_command(
        commands, "sample", SampleConfig, sample, "make images: numbered PNGs and a grid",
        "Make images: numbered PNGs and a grid, the same ones whatever the batch size.",
        model="a folder, a training checkpoint, or a model of the Hub",
    )  # fmt: skip
    _add_command(
        commands, "push", PushConfig, push, "share a model on the Hub",
        "Export a model with its card and push it in one commit: the model alone, no training state, no logs.",
        model="a folder: a saved pipeline, a training run or a checkpoint", repo_id="its name on the Hub: owner/name",
    )  # fmt: skip
    _add_command(
        commands, "convert", ConvertConfig, convert, "make a model that loads three ways of another one",
        "Convert a model, and verify that the result's outputs are equal.",
        source="a DDPM of diffusers (folder or Hub), a training checkpoint, or a weight file of DDPM (Ho et al., "
        "PyTorch ports) or improved-diffusion",
        destination="a new folder",
    )  # fmt: skip

    options = vars(parser.parse_args(sys.argv[1:] if argv is None else list(argv)))
    run, config_type, positionals = (options.pop(name) for name in ("run", "config_type", "positionals"))
    options.pop("command")
    try:
        run(*(options.pop(name) for name in positionals), config_type(**options))
    except (ValueError, OSError) as error:
        exit_with_error(error)


def _add_command(
    commands: Any, name: str, config_type: type, run: Callable[..., object], help: str, description: str,
    **positionals: str,
) -> None:  # fmt: skip
    """A command whose options are the fields of a dataclass, and which runs as `run(*positionals, config)`."""
    arguments = " ".join(argument.upper() for argument in positionals)
    parser = commands.add_parser(
        name,
        dataclass_types=[config_type],
        help=help,
        description=description,
        usage=f"ddpm-hf {name} {arguments} [--OPTION VALUE …]",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    for argument, meaning in positionals.items():
        parser.add_argument(argument, metavar=argument.upper(), help=meaning)
    parser.set_defaults(run=run, config_type=config_type, positionals=list(positionals))


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


def push(model: str, repo_id: str, config: PushConfig) -> str:
    """Push the model of a folder; returns the address of the commit or pull request."""
    from .card import CardFacts
    from .hub import HubTarget
    from .sharing import push_folder, resume_command

    target = HubTarget(
        repo_id, config.hub_token, config.private, config.revision, config.tag, create_pr=config.create_pr
    )
    try:
        url = push_folder(Path(model), target, CardFacts(license=config.license))
    except OSError as error:
        raise OSError(f"{error}\nTry again with:\n  {resume_command(Path(model), target)}") from error
    print(f"Pushed: {url}")
    return url


def convert(source: str, destination: str, config: ConvertConfig) -> Path:
    """Write a converted model into a new folder; returns the folder."""
    from .convert import convert_model

    folder = convert_model(source, Path(destination), config)
    print(f"{source} is now {folder}, with equal outputs.\nSee it with:\n  ddpm-hf sample {shlex.quote(str(folder))}")
    return folder


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
