"""The `ddpm-hf` command: its sub-commands, and what each of them takes. `commands` has what they do."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__
from .commands.cache import cache
from .commands.calibrate import calibrate
from .commands.codec import compress, decompress
from .commands.convert import convert
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.env import env
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.paper import paper
from .commands.push import push
from .commands.restore import edit, interpolate, restore
from .commands.sample import sample
from .commands.train import train
from .config.codec import CompressConfig, DecompressConfig
from .config.commands import (
    CacheConfig,
    CalibrateConfig,
    ConvertConfig,
    DemoConfig,
    DoctorConfig,
    EnvConfig,
    EvaluateConfig,
    ExportConfig,
    PaperConfig,
    PushConfig,
    SampleConfig,
)
from .config.parsing import HelpFormatter, HfArgumentParser
from .config.restoration import EditConfig, InterpolateConfig, RestoreConfig
from .console import one_line_errors

DESCRIPTION = """\
DDPM (Ho et al. 2020) for the Hugging Face ecosystem.

Train a model, on scikit-learn's digits or on images of your own:

  ddpm-hf train
  ddpm-hf train --train_data_dir my-images --resolution 64 --use_ema --output_dir my-ddpm
  ddpm-hf train --config cifar10 --num_processes 8 --train_batch_size 16

Sample from it:

  ddpm-hf sample ddpm-digits                                64 images
  ddpm-hf sample ddpm-digits/checkpoint-500                 … of a training checkpoint
  ddpm-hf sample google/ddpm-cifar10-32 --num_images 16     … of any DDPM on the Hub
  ddpm-hf sample ddpm-digits --steps 25 --eta 0 --solver_order 2

Restore photos with it, without training:

  ddpm-hf restore ddpm-digits photo.png --mask mask.png     paint where the mask is white
  ddpm-hf restore MODEL photos/*.jpg --upscale 4            or --colorize, or --deblur 1.5
  ddpm-hf edit MODEL drawing.png --strength 0.5             make it look like the model's images
  ddpm-hf interpolate MODEL a.png b.png --steps 9           a strip and a GIF from one to the other

Measure it: bits/dim, distances to real images, copies of training images:

  ddpm-hf evaluate ddpm-digits --dataset digits

See the paper's figures of it, on one page:

  ddpm-hf paper ddpm-digits --dataset digits

Calibrate it for the best likelihood in few steps, then sample with --spacing optimal --variance_type optimal:

  ddpm-hf calibrate ddpm-digits --dataset digits

Find out why its samples are bad, whoever made it:

  ddpm-hf doctor google/ddpm-cifar10-32 --dataset my-images

Compress images of its kind, without loss or to a rate or a PSNR, and get them back:

  ddpm-hf compress ddpm-digits scans/*.png -o scans.ddpm
  ddpm-hf compress ddpm-digits scans/*.png -o small.ddpm --target_psnr 35
  ddpm-hf decompress scans.ddpm -o scans-again

Share it, or convert another model:

  ddpm-hf push ddpm-digits me/ddpm-digits --private
  ddpm-hf convert google/ddpm-cifar10-32 my-cifar10

Run it without Python: the network in ONNX, and its sampling loop as a table:

  ddpm-hf export ddpm-digits

See which decoded images are on the disk, and remove those that were not used for 30 days:

  ddpm-hf cache
  ddpm-hf cache --prune --older_than 30

See what of this machine will be used (and report it with a bug):

  ddpm-hf env

Several processes: ddpm-hf train --num_processes N; for sample, evaluate and calibrate,
accelerate launch -m ddpm_hf sample …
"""
MODEL = "a folder, a training checkpoint, or a model on the Hub"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; foreseen errors end with one line and status 1."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with one_line_errors(_again(arguments)):
        if arguments[:1] == ["train"]:  # it reads a YAML file between the defaults and the flags
            train(arguments[1:])
            return
        options = vars(_parser().parse_args(arguments))
        run, config_type, positionals = (options.pop(name) for name in ("run", "config_type", "positionals"))
        options.pop("command")
        run(*(options.pop(name) for name in positionals), config_type(**options))


def _again(arguments: Sequence[str]) -> str:
    """How an interrupted command resumes, without the token that may be one of its arguments."""
    words, is_secret = [], False
    for word in arguments:
        if not is_secret and not word.startswith("--hub_token"):
            words.append(word)
        is_secret = word == "--hub_token"
    return f"Run it again with:\n  {shlex.join(['ddpm-hf', *words])}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ddpm-hf", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("--version", action="version", version=f"ddpm-hf {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", required=True, parser_class=HfArgumentParser
    )
    commands.add_parser("train", dataclass_types=[], help="train a model", add_help=False)
    _add_command(
        commands, "sample", SampleConfig, sample, "make images: numbered PNGs or one .npz, and a grid",
        "Make images: numbered PNGs or one .npz, and a grid. An interrupted run resumes, and a larger --num_images "
        "adds to the folder. By several processes: accelerate launch -m ddpm_hf sample MODEL …",
        model=MODEL,
    )  # fmt: skip
    _add_command(
        commands, "restore", RestoreConfig, restore, "restore photos: paint over a part, enlarge, colorize, deblur",
        "Restore photos with a model of such images, without training. Writes PNGs of the photos' names; outside of a "
        "mask's white part, a photo stays untouched. An interrupted run resumes.",
        model=MODEL, photos="image files, in any format that Pillow reads",
    )  # fmt: skip
    _add_command(
        commands, "edit", EditConfig, edit, "make photos or drawings look like the model's images",
        "Add noise to photos or drawings, and let the model take it away (SDEdit). Writes PNGs of the photos' names. "
        "An interrupted run resumes.",
        model=MODEL, photos="image files, in any format that Pillow reads",
    )  # fmt: skip
    _add_command(
        commands, "interpolate", InterpolateConfig, interpolate, "go from one photo to another: a strip and a GIF",
        "Make images between two photos. Writes A-B.png, a strip, and A-B.gif.",
        model=MODEL, a="the photo to start from", b="the photo to go to",
    )  # fmt: skip
    _add_command(
        commands, "compress", CompressConfig, compress, "compress images, without loss or to a rate or PSNR",
        "Compress images of a model's kind into one file: without loss, by bits-back coding, where decoding needs the "
        "same kind of processor and the same versions; or, with --bits_per_pixel or --target_psnr, into a progressive "
        "file of which any prefix decodes, anywhere. Says how many bits were spent.",
        model=MODEL, images="image files of the model's size, or of any size with --tile",
    )  # fmt: skip
    _add_command(
        commands, "decompress", DecompressConfig, decompress, "get the images of a compressed file back",
        "Write the images of a file that `ddpm-hf compress` made, bit by bit as they were; or, of a progressive file, "
        "as well as the intact part of it shows them.",
        file="the file", own_model="the model, where the file's own name for it does not lead there",
    )  # fmt: skip
    _add_command(
        commands, "calibrate", CalibrateConfig, calibrate, "measure a model for the optimal variance and timesteps",
        "Measure the error of a model at every timestep, which gives the optimal variance and the best timesteps, and "
        "save it in the model's scheduler. By several processes: accelerate launch -m ddpm_hf calibrate MODEL …",
        model=MODEL,
    )  # fmt: skip
    _add_command(
        commands, "evaluate", EvaluateConfig, evaluate, "measure a model: bits/dim, FID, KID, precision, copies",
        "Measure a model: the likelihood of images, the quality of samples, and whether they are copies of training "
        "images. Writes metrics.json, pictures and the model's card. An interrupted run resumes. By several processes: "
        "accelerate launch -m ddpm_hf evaluate MODEL …",
        model=MODEL,
    )  # fmt: skip
    _add_command(
        commands, "paper", PaperConfig, paper, "draw the paper's figures of a model, on one page",
        "Draw the figures and tables of Ho et al. (2020) that a model and a data set allow, and write a page that "
        "explains "
        "them. Says first what it will cost; an interrupted run resumes.",
        model=MODEL,
    )  # fmt: skip
    _add_command(
        commands, "push", PushConfig, push, "share a model on the Hub",
        "Export a model with its card and push it in one commit, without training state and logs.",
        model="a folder: a saved pipeline, a training run or a checkpoint", repo_id="its name on the Hub: owner/name",
    )  # fmt: skip
    _add_command(
        commands, "convert", ConvertConfig, convert, "convert another model, so that it loads three ways",
        "Convert a model, and verify that its outputs stay equal.",
        source="a DDPM of diffusers (folder or Hub), a training checkpoint, or a weight file of DDPM (Ho et al., "
        "PyTorch ports) or improved-diffusion",
        destination="a new folder",
    )  # fmt: skip
    _add_command(
        commands, "export", ExportConfig, export, "write a model for other programs: ONNX, and its sampler as JSON",
        "Write model.onnx, compared with PyTorch's network, and sampler.json, the table of its sampling loop.",
        model=MODEL,
    )  # fmt: skip
    _add_command(
        commands, "demo", DemoConfig, demo, "try a model: an app, or a page that samples in the browser",
        "Serve an app (Gradio) for a model, or with --static write a folder with a page that samples in the browser, "
        "from any web server and offline.",
        model=MODEL,
    )  # fmt: skip
    _add_command(
        commands, "cache", CacheConfig, cache, "list decoded images on the disk, and remove old ones",
        "List the caches of decoded images on the disk, and remove those that are incomplete or were not used for "
        "long. What a run is using stays.",
    )  # fmt: skip
    _add_command(
        commands, "doctor", DoctorConfig, doctor, "find what is wrong with a model, and repair it",
        "Examine a model: its files, weights and scheduler, and, with images of its training, whether they belong "
        "together: prediction type, noise schedule, T, pixel range, channel order, settings of the network. Each "
        "finding comes with its evidence and its remedy; --fix writes a repaired copy. Faults end with status 1.",
        model=MODEL,
    )  # fmt: skip
    _add_command(
        commands, "env", EnvConfig, env, "show this machine, and what of it will be used",
        "Show versions, device, precision, compiler and cache folders: what a bug report needs.",
    )  # fmt: skip
    return parser


def _add_command(
    commands: Any, name: str, config_type: type, run: Callable[..., object], help: str, description: str,
    **positionals: str,
) -> None:  # fmt: skip
    """A command whose options are the fields of a dataclass, and which runs as `run(*positionals, config)`.

    The positional arguments `photos` and `images` take one or more, and `own_model` may be left out.
    """
    names = {"photos": "PHOTO", "images": "IMAGE", "own_model": "MODEL"}
    numbers = {"photos": "+", "images": "+", "own_model": "?"}
    shown = {argument: names.get(argument, argument.upper()) for argument in positionals}
    around = {"+": "{} […]", "?": "[{}]", None: "{}"}
    words = [around[numbers.get(argument)].format(word) for argument, word in shown.items()]
    usage = " ".join(["ddpm-hf", name, *words, "[--OPTION VALUE …]"])
    parser = commands.add_parser(
        name,
        dataclass_types=[config_type],
        help=help,
        description=description,
        usage=usage,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    for argument, meaning in positionals.items():
        parser.add_argument(argument, metavar=shown[argument], help=meaning, nargs=numbers.get(argument))
    parser.set_defaults(run=run, config_type=config_type, positionals=list(positionals))
