"""Options: fields with a default and a help text, and checks whose errors name them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def option(default: Any, help: str, aliases: Sequence[str] = ()) -> Any:
    """A field of a configuration, which is a flag and a YAML key too."""
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


def check_types(config: object) -> None:
    """Raise a ValueError for values of a wrong type or outside a fixed set; argparse checks flags, but not YAML."""
    hints = get_type_hints(type(config))
    for name in (f.name for f in fields(config)):  # type: ignore[arg-type]
        value, hint = getattr(config, name), hints[name]
        alternatives = list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]
        if value is None and NoneType in alternatives:
            continue
        literal = next((t for t in alternatives if get_origin(t) is Literal), None)
        if literal is not None:
            if value not in get_args(literal):
                allowed = ", ".join(map(repr, get_args(literal)))
                raise ValueError(f"`{name}` is {value!r}, but must be one of {allowed}.")
            continue
        types = tuple(get_origin(t) or t for t in alternatives)
        if float in types:
            types = (*types, int)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(t.__name__ for t in types if t is not NoneType)
            raise ValueError(f"`{name}` is {value!r}, but must be of type {wanted}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}, but must be finite.")


def at_least(minimum: int, config: object, *names: str) -> None:
    """Raise a ValueError unless these options are at least `minimum`, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` is {value}, but must be at least {minimum}.")


def positive(config: object, *names: str) -> None:
    """Raise a ValueError unless these options are positive, or None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` is {value}, but must be positive.")


def fraction(config: object, *names: str) -> None:
    """Raise a ValueError unless these options lie in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` is {value}, but must lie in [0, 1).")


def check_seed(seed: int, images: int = 1) -> None:
    """Raise a ValueError unless torch accepts `seed`, …, `seed + images - 1`."""
    if not 0 <= seed <= 2**63 - images:
        raise ValueError(f"`seed` is {seed}, but must lie between 0 and 2^63 - {images}.")


UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}  # seconds


def duration(text: str, name: str) -> float:
    """The seconds of a duration such as 30m, 8h, 1d12h, 90s or 1.5h, with or without a + before it.

    Raises:
        ValueError: naming the option, for what is no duration.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if "".join(map("".join, parts)) != text.removeprefix("+") or not seconds:
        raise ValueError(f"`{name}` is {text!r}, but must be a duration such as 30m, 8h, 1d12h or 90s.")
    return seconds
