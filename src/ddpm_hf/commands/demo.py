"""`ddpm-hf demo`: a model to try, in an app or in a page."""

from __future__ import annotations

from pathlib import Path

from ..config.commands import DemoConfig


def demo(model: str, config: DemoConfig) -> Path:
    """Write a page that samples in the browser; returns its folder."""
    from ..demo.static_page import write_static_page
    from ..storage.loading import load_pipeline

    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    folder = Path(config.output_dir or f"{name}-demo")
    num_bytes = write_static_page(
        load_pipeline(model, config.revision), folder, name, config.dtype, config.max_megabytes
    )
    print(
        f"The page is in {folder}/ ({num_bytes / 1e6:.1f} MB). Open it by a web server:\n"
        f"  python -m http.server --directory {folder} 8000     then http://127.0.0.1:8000"
    )
    return folder
