"""Options from a command line and a YAML file, and the look of --help."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .training import GROUPS, TrainConfig

if TYPE_CHECKING:
    from transformers import HfArgumentParser

PRESETS = Path(__file__).parent / "presets"
DEFAULT_PRESET = "digits"


def _hf_argument_parser() -> Any:
    """`HfArgumentParser` from its file, which takes 40 ms; all of `transformers` takes 600."""
    package: Any = find_spec("transformers")
    spec: Any = spec_from_file_location("transformers.hf_argparser", Path(package.origin).with_name("hf_argparser.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HfArgumentParser


if not TYPE_CHECKING:
    HfArgumentParser = _hf_argument_parser()


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Flags over YAML over defaults. Without a source of images, the preset `digits` is the YAML file.

    Raises:
        SystemExit: with argparse's message, for unknown flags or values of the wrong type.
        ValueError: naming the option, for values that make no sense.
    """
    parser = HfArgumentParser(
        GROUPS,
        prog="train.py",
        usage="%(prog)s [--config PRESET] [--OPTION VALUE …]",
        description="Train a DDPM. Without any option: scikit-learn's digits, in about five minutes on two CPU cores.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="PRESET",
        help=f"Options from a preset ({', '.join(presets())}) or a YAML file; flags override it.",
    )
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


def exit_with_error(error: Exception) -> None:
    """End a command with the message of a foreseen error, without a traceback."""
    sys.exit(f"error: {error}")
