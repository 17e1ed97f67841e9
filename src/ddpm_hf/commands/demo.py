"""`ddpm-hf demo`: a model to try, in an app or in a page, here or on the Hub."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from ..config.commands import DemoConfig
from .model import load_on_device


def demo(model: str, config: DemoConfig) -> Path | str | None:
    """Serve an app, write a page that samples in the browser (returns its folder), or push one (returns its URL)."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    if not config.static:
        for option, value in (("output_dir", config.output_dir), ("dtype", config.dtype)):
            if value not in (None, "float32"):
                raise ValueError(f"`{option}` is {value!r}, but only a page has one: add --static, or leave it out.")
        check_gradio()
    if config.push is not None:
        return _push(model, name, config)
    if config.static:
        folder = Path(config.output_dir or f"{name}-demo")
        num_bytes = _write_page(model, name, folder, config)
        print(
            f"The page is in {folder}/ ({num_bytes / 1e6:.1f} MB). Open it by a web server:\n"
            f"  python -m http.server --directory {folder} 8000     then http://127.0.0.1:8000"
        )
        return folder
    pipeline = load_on_device(model, config.revision, config.device)
    from ..demo.app import launch

    launch(pipeline, name)
    return None


def check_gradio() -> None:
    """Raise a ValueError unless Gradio is installed."""
    if find_spec("gradio") is None:
        raise ValueError("the app needs Gradio: pip install 'ddpm-hf[demo]'. A page without a server: --static.")


def _write_page(model: str, name: str, folder: Path, config: DemoConfig) -> int:
    from ..demo.static_page import write_static_page
    from ..storage.loading import load_pipeline

    pipeline = load_pipeline(model, config.revision)
    return write_static_page(pipeline, folder, name, config.dtype, config.max_megabytes)


def _push(model: str, name: str, config: DemoConfig) -> str:
    """Check the right to write, build the demo, and push it in one commit."""
    from dataclasses import replace

    from ..demo.space import push_space, stage_app
    from ..demo.static_page import check_page_size
    from ..sharing.hub import HubTarget, check_push_access, readable_errors
    from ..storage.loading import load_pipeline

    sdk = "static" if config.static else "gradio"
    target = HubTarget(str(config.push), config.hub_token, config.private, repo_type="space", space_sdk=sdk)
    pipeline = load_pipeline(model, config.revision)
    if config.static:
        check_page_size(pipeline, config.dtype, config.max_megabytes)
    target = replace(target, repo_id=check_push_access(target))
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "space"
        if config.static:
            _write_page(model, name, stage, config)
        else:
            revision = None
            if not Path(model).is_dir():
                with readable_errors(replace(target, repo_id=model)):
                    revision = target.api().model_info(model, revision=config.revision).sha
            stage.mkdir()
            stage_app(stage, name, model, revision)
        url = push_space(stage, target, name, model)
    print(f"Pushed: {url}")
    return url
