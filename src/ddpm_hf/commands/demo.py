"""`ddpm-hf demo`: a model to try, in an app or in a page."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..config.commands import DemoConfig
from .model import load_on_device


def demo(model: str, config: DemoConfig) -> Path | None:
    """Serve an app, or write a page that samples in the browser; returns the folder of the page."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    if config.static:
        return _write_page(model, name, config)
    if find_spec("gradio") is None:
        raise ValueError("the app needs Gradio: pip install 'ddpm-hf[demo]'. A page without a server: --static.")
    pipeline = load_on_device(model, config.revision, config.device)
    from ..demo.app import launch

    launch(pipeline, name)
    return None


def _write_page(model: str, name: str, config: DemoConfig) -> Path:
    from ..demo.static_page import write_static_page
    from ..storage.loading import load_pipeline

    folder = Path(config.output_dir or f"{name}-demo")
    pipeline = load_pipeline(model, config.revision)
    num_bytes = write_static_page(pipeline, folder, name, config.dtype, config.max_megabytes)
    print(
        f"The page is in {folder}/ ({num_bytes / 1e6:.1f} MB). Open it by a web server:\n"
        f"  python -m http.server --directory {folder} 8000     then http://127.0.0.1:8000"
    )
    return folder
