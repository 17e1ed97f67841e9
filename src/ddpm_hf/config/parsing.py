"""Options from a command line and a YAML file, and the look of --help."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from .launch import LaunchOptions
from .training import GROUPS, TrainConfig

if TYPE_CHECKING:
    from transformers import HfArgumentParser

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "digits"
NOT_GIVEN = object()
SOURCES = ("dataset_name", "train_data_dir")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TRAIN_DESCRIPTION = """\
Train a DDPM. Without options: scikit-learn's digits, in about five minutes on two CPU cores.

  ddpm-hf train my-images --time_budget 30m             choose everything for that time
  ddpm-hf train --config cifar10 --num_processes 8 --train_batch_size 16
  ddpm-hf train --config cifar10 --dry_run              show what a command would do
"""


def _hf_argument_parser() -> Any:
    """`HfArgumentParser` from its file, which takes 40 ms; all of `transformers` takes 600."""
    package: Any = find_spec("transformers")
    spec: Any = spec_from_file_location("transformers.hf_argparser", Path(package.origin).with_name("hf_argparser.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HfArgumentParser


if not TYPE_CHECKING:
    HfArgumentParser = _hf_argument_parser()


def parse_train_config(argv: Sequence[str], epilog: str | None = None, **defaults: Any) -> TrainConfig:
    """Flags over YAML over defaults. Without a source of images, the preset `digits` is the YAML file.

    Args:
        argv: the options of a run.
        epilog: shown at the end of --help.
        defaults: of options, instead of those of `TrainConfig`.

    Raises:
        SystemExit: with argparse's message, for unknown flags or values of the wrong type.
        ValueError: naming the option, for values that make no sense.
    """
    return TrainConfig(**with_images({**defaults, **_given(argv, epilog, takes_images=False)}))


def parse_given(argv: Sequence[str], epilog: str | None = None) -> dict[str, Any]:
    """The options that `ddpm-hf train` was given: by flags, by a YAML file, and the images by their place or name.

    With a time budget, nothing stands for what is not given: the plan of the run chooses it.

    Raises:
        SystemExit, ValueError: as `parse_train_config`.
    """
    given = _given(argv, epilog, takes_images=True)
    TrainConfig(**with_images(given))  # mistakes are found before anything heavy is imported
    return given


def with_images(given: dict[str, Any]) -> dict[str, Any]:
    """The options with the digits, where no images are named. A run that is continued has its own instead."""
    named = any(given.get(name) is not None for name in SOURCES)
    return given if named else {**given, "dataset_name": DEFAULT_PRESET}


def _given(argv: Sequence[str], epilog: str | None, takes_images: bool) -> dict[str, Any]:
    phrases = "".join(f"\n  {name:26}{_first_comment(PRESETS / f'{name}.yaml')}" for name in presets())
    parser = HfArgumentParser(
        cast(Any, GROUPS),  # its stubs know no tuples of dataclasses
        prog="ddpm-hf train",
        usage=f"%(prog)s {'[IMAGES] ' if takes_images else ''}[--config PRESET] [--OPTION VALUE …]",
        description=f"{TRAIN_DESCRIPTION}\npresets:{phrases}",
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="PRESET", help="Options from a preset or a YAML file; flags override them.", default=None
    )
    if takes_images:
        parser.add_argument(
            "images", nargs="?", metavar="IMAGES",
            help="What to train on: a folder of images, or whatever --dataset_name takes.",
        )  # fmt: skip
    known = {f.name for f in fields(TrainConfig)}
    shown = vars(parser.parse_args(list(argv)))  # --help shows the defaults
    parser.set_defaults(**dict.fromkeys(known, NOT_GIVEN))
    flags = _known(parser.parse_args(list(argv)))
    if shown.get("images") is not None:
        flags[_kind_of_source(shown["images"], flags)] = shown["images"]
    has_source, file = any(flags.get(name) is not None for name in SOURCES), shown["config"]
    if file is None and not has_source:
        if flags.get("time_budget") is not None:
            return flags
        file = DEFAULT_PRESET
    if file is not None:
        parser.set_defaults(**_read_yaml(preset_file(file), known))
        if has_source:  # a source on the command line replaces the file's
            parser.set_defaults(**dict.fromkeys(SOURCES, NOT_GIVEN))
    return _known(parser.parse_args(list(argv))) | flags


def _known(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a run that were given."""
    return {
        name: value
        for name, value in vars(options).items()
        if name not in ("config", "images") and value is not NOT_GIVEN
    }


def _kind_of_source(images: str, given: Mapping[str, Any]) -> str:
    """The option that takes these images: a folder of files, or a dataset of whatever kind."""
    twice = [name for name in SOURCES if given.get(name) is not None]
    if twice:
        raise ValueError(f"the images are {images!r}, but --{twice[0]} is {given[twice[0]]!r}: leave one of them out.")
    folder = Path(images)
    is_dataset = any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    if folder.is_dir() and not is_dataset and not any(folder.glob("**/*.parquet")):
        return "train_data_dir"
    if folder.is_file() and folder.suffix.lower() in PICTURES:
        raise ValueError(f"{images!r} is a single image: pass the folder that it is in.")
    return "dataset_name"


def parse_train_command(argv: Sequence[str]) -> tuple[LaunchOptions, list[str]]:
    """What Accelerate's launcher is told, and the flags that every process gets, which are checked here first.

    Raises:
        SystemExit, ValueError: as `parse_train_config`.
    """
    parser = HfArgumentParser(
        cast(Any, LaunchOptions),
        prog="ddpm-hf train",
        usage=argparse.SUPPRESS,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    given, others = parser.parse_known_args(list(argv))
    launch_options = LaunchOptions(**vars(given))
    parse_given(others, epilog=parser.format_help())
    return launch_options, others


def presets() -> list[str]:
    """The names of the presets that the package ships."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The YAML file of a preset, or the file of that path.

    Raises:
        ValueError: where there is neither.
    """
    file = PRESETS / f"{name}.yaml" if name in presets() else Path(name)
    if not file.is_file():
        raise ValueError(f"`config` is {name!r}, but must be one of {', '.join(presets())}, or a YAML file.")
    return file


def _first_comment(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return next(lines).removeprefix("#").strip()


def _read_yaml(file: Path, known: set[str]) -> dict[str, Any]:
    try:
        options = yaml.safe_load(file.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} must hold `option: value` lines.")
    unknown = sorted(str(name) for name in options if name not in known)
    if unknown:
        raise ValueError(f"{file} has unknown options {', '.join(unknown)}: see --help for those that exist.")
    return options


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, short names for its value, and its default if it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
