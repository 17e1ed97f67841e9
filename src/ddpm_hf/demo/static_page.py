"""`ddpm-hf demo --static`: a folder with a page that samples in the browser, from any web server and offline."""

from __future__ import annotations

import shutil
import tempfile
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Literal

import torch

from ..diffusion.pipeline import DDPMPipelineCustom
from ..export.export import export_onnx
from ..storage.files import check_free_space, check_writable
from .onnxruntime_web import VERSION, copy_runtime

PAGE_FILES = ("page.js", "worker.js", "sampler.js", "style.css")
RUNTIME_MEGABYTES = 12  # of the folder
# Pages that share memory among threads must be isolated; Spaces send these headers if their card says so.
HEADERS = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}


def check_page_size(pipeline: DDPMPipelineCustom, dtype: str, max_megabytes: float) -> None:
    """Raise a ValueError for a network whose weights are more than a browser should be made to load."""
    megabytes = pipeline.unet.num_parameters() * getattr(torch, dtype).itemsize / 1e6
    if megabytes > max_megabytes:
        smaller = " Half of it: --dtype float16." if dtype == "float32" else ""
        raise ValueError(
            f"the network has {megabytes:,.0f} MB in {dtype}, but a page may have {max_megabytes:g} MB: every visitor "
            f"loads them, and computes without a server.{smaller} To allow it: --max_megabytes {megabytes + 1:.0f}."
        )


def write_static_page(
    pipeline: DDPMPipelineCustom,
    output_dir: Path,
    title: str,
    dtype: Literal["float32", "float16"] = "float32",
    max_megabytes: float = 100,
) -> int:
    """Write the page into a new or empty folder; it is there completely, or not at all.

    Args:
        pipeline: in float32, on the CPU.
        title: the heading, plain text.
        dtype: of the network in the browser.
        max_megabytes: the most that its weights may have.

    Returns:
        The bytes of the folder.

    Raises:
        ValueError: for a network that is too large or can't be exported, a folder that holds something or can't be
            written to, and where onnxruntime-web can't be had.
    """
    check_page_size(pipeline, dtype, max_megabytes)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which exists and is not empty: remove it, or choose one."
        )
    check_writable(output_dir)
    check_free_space(output_dir, pipeline.unet.num_parameters() * 8 + RUNTIME_MEGABYTES * 10**6, "the page's files")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".ddpm-hf-demo-") as name:
        stage = Path(name) / "page"
        copy_runtime(stage / "onnxruntime")
        export_onnx(pipeline, stage / "model", dtype, for_browsers=True, num_inference_steps=1)
        source = files("ddpm_hf") / "demo" / "page"
        for file in PAGE_FILES:
            (stage / file).write_bytes((source / file).read_bytes())
        page = Template((source / "index.html").read_text("utf-8")).substitute(
            title=escape(title), about=_about(pipeline), footer=_footer()
        )
        (stage / "index.html").write_text(page, "utf-8")
        if output_dir.exists():
            output_dir.rmdir()
        shutil.move(stage, output_dir)
    return sum(file.stat().st_size for file in output_dir.rglob("*") if file.is_file())


def _about(pipeline: DDPMPipelineCustom) -> str:
    parameters = pipeline.unet.num_parameters()
    size = f"{parameters / 1e6:.1f} million" if parameters >= 1e6 else f"{parameters:,}"
    return f"The network has {size} parameters."


def _footer() -> str:
    return (
        f"Made with ddpm-hf. The network is computed by onnxruntime-web {VERSION} (MIT license). "
        "<code>ddpm-hf sample MODEL --rng philox</code> gives the same images for the same seed and options."
    )
