"""The `ddpm-hf` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .commands import calibrate, convert, evaluate, push, sample
from .config.commands import CalibrateConfig, ConvertConfig, EvaluateConfig, PushConfig, SampleConfig
from .config.parsing import HelpFormatter, HfArgumentParser, exit_with_error

DESCRIPTION = """\
DDPM (Ho et al. 2020) for the Hugging Face ecosystem.

Train a model with `accelerate launch training/train.py`, then look at what it makes:

  ddpm-hf sample ddpm-digits                                64 images of a model trained here
  ddpm-hf sample ddpm-digits/checkpoint-500                 … of a training checkpoint
  ddpm-hf sample google/ddpm-cifar10-32 --num_images 16     … of a model of the Hub, stock ones included

Good images in few steps, and what the best ones for the likelihood need:

  ddpm-hf sample ddpm-digits --steps 25 --eta 0 --solver_order 2
  ddpm-hf calibrate ddpm-digits --dataset digits            then also --spacing optimal, --variance_type optimal

Measure it: bits/dim, distances to real images, what is copied from them:

  ddpm-hf evaluate ddpm-digits --dataset digits

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
        commands, "sample", SampleConfig, sample, "make images: numbered PNGs or one .npz, and a grid",
        "Make images: numbered PNGs or one .npz, and a grid. A run that was killed goes on where it was, and one with "
        "more images adds to them. By many processes: accelerate launch training/sample.py MODEL …",
        model="a folder, a training checkpoint, or a model of the Hub",
    )  # fmt: skip
    _add_command(
        commands, "calibrate", CalibrateConfig, calibrate, "measure a model, for the optimal variance and timesteps",
        "Measure the error of a model at every timestep, which gives the optimal variance and the best timesteps, and "
        "keep it in the model's scheduler.",
        model="a folder, a training checkpoint, or a model of the Hub",
    )  # fmt: skip
    _add_command(
        commands, "evaluate", EvaluateConfig, evaluate, "measure a model: bits/dim, FID, KID, precision, copies",
        "Measure a model: the likelihood of images, the quality of samples, and whether they are copies of training "
        "images. Writes metrics.json, pictures and the model's card. A run that was killed is gone on with.",
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
    except KeyboardInterrupt:
        print("\nInterrupted. What was saved before is unharmed.", file=sys.stderr)
        sys.exit(130)


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
