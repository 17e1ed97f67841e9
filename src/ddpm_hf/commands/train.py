"""`ddpm-hf train`: in this process, or in those of Accelerate's launcher."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.parsing import parse_train_command
from ..recipe.command import main as train_here


def train(argv: Sequence[str]) -> None:
    """Train in this process, or in the processes that Accelerate's launcher starts."""
    options, others = parse_train_command(argv)  # mistakes are found before torch is imported
    from ..training.launch import is_launched, launch, needs_launcher

    if is_launched() and options.given():
        raise ValueError(
            f"{options.given()[0]} configures a launcher, but a launcher has started this process: leave it out."
        )
    if needs_launcher(options) and not is_launched():
        launch(options, others, "ddpm_hf.recipe")
    else:
        train_here(others)
