"""`ddpm-hf paper`."""

from __future__ import annotations

from pathlib import Path

from ..config.commands import PaperConfig
from .model import load_on_device


def paper(model: str, config: PaperConfig) -> Path:
    """Draw the paper's figures of a model, and write the page that explains them; returns the path of the page."""
    from ..paper.report import write_report
    from ..sampling.batch_size import out_of_memory_explained

    pipeline = load_on_device(model, config.revision, config.device)
    name = Path(model).resolve().name if Path(model).is_dir() else model
    with out_of_memory_explained(
        f"`batch_size` is {config.batch_size}: pass a smaller --batch_size. What was made before is kept."
    ):
        page = write_report(pipeline, config, name)
    print(f"The figures are on {page}; open it in a browser.")
    return page
