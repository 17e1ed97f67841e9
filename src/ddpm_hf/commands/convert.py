"""`ddpm-hf convert`."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config.commands import ConvertConfig


def convert(source: str, destination: str, config: ConvertConfig) -> Path:
    """Convert a model into a new folder; returns the folder."""
    from ..sharing.conversion.convert import convert_model

    folder = convert_model(source, Path(destination), config)
    print(f"Converted {source} to {folder}; the outputs are equal.")
    print(f"Sample with:\n  ddpm-hf sample {shlex.quote(str(folder))}")
    return folder
