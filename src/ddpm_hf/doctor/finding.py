"""A finding: what was found, with a number as evidence, what follows from it, and what repairs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Repair:
    """Changes to a copy of a model, which `ddpm-hf doctor MODEL --fix OUTPUT` makes.

    Args:
        scheduler: new values of its configuration; None removes a key that starts with an underscore.
        unet: new values of the network's configuration.
        weights: makes the right weights of the wrong ones.
    """

    scheduler: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    weights: Callable[[Weights], Weights] | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`fault`), or that is good to know (`note`).

    Args:
        name: of the kind of finding, for programs.
        what: a sentence.
        evidence: what was measured or read, with its number.
        consequence: what a user sees of it.
        remedy: what to do, a command if there is one; `{fix}` stands for this command with `--fix`.
        repair: what `--fix` changes; None where a changed copy is no remedy.
    """

    name: str
    what: str
    evidence: str
    consequence: str
    remedy: str = "{fix}"
    repair: Repair | None = None
    severity: Literal["fault", "note"] = "fault"
