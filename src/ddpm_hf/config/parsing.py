"""Options from a command line and a YAML file, and the look of --help."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
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
TRAIN_DESCRIPTION = """\
Train a DDPM. Without options: scikit-learn's digits, in about five minutes on two CPU cores.

  ddpm-hf train --train_data_dir my-images --resolution 64 --use_ema --output_dir my-ddpm
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
        argv: what follows `ddpm-hf train`.
        epilog: shown at the end of --help.
        defaults: of options, instead of those of `TrainConfig`.

    Raises:
        SystemExit: with argparse's message, for unknown flags or values of the wrong type.
        ValueError: naming the option, for values that make no sense.
    """
    phrases = "".join(f"\n  {name:26}{_first_comment(PRESETS / f'{name}.yaml')}" for name in presets())
    parser = HfArgumentParser(
        cast(Any, GROUPS),  # its stubs know no tuples of dataclasses
        prog="ddpm-hf train",
        usage="%(prog)s [--config PRESET] [--OPTION VALUE …]",
        description=f"{TRAIN_DESCRIPTION}\npresets:{phrases}",
        epilog=epilog,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="PRESET", help="Options from a preset or a YAML file; flags override them.", default=None
    )
    parser.set_defaults(**defaults)
    given = parser.parse_args(list(argv))
    has_source = given.dataset_name is not None or given.train_data_dir is not None
    chosen = given.config or (None if has_source else DEFAULT_PRESET)
    if chosen is not None:
        parser.set_defaults(**_read_yaml(preset_file(chosen), {f.name for f in fields(TrainConfig)}))
        if has_source:  # a source on the command line replaces the file's
            parser.set_defaults(dataset_name=None, train_data_dir=None)
    options = vars(parser.parse_args(list(argv)))
    options.pop("config")
    return TrainConfig(**options)


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
    parse_train_config(others, epilog=parser.format_help())
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
