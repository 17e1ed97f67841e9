"""`ddpm-hf env`."""

from __future__ import annotations

from ..config.commands import EnvConfig


def env(config: EnvConfig) -> None:
    """Print what this machine is, and what training and sampling will use of it."""
    from ..training.environment import describe_environment

    print(describe_environment())
