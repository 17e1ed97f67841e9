"""`ddpm-hf export`: a network in ONNX that is proven equal to PyTorch's, and the table of its sampling loop."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..sampling.onnx_network import missing_packages, open_session, optimize_onnx, write_onnx
from ..storage.files import check_free_space, check_writable, write_text_atomically
from ..storage.weights import hash_weights
from .sampler_table import sampler_table

# The largest difference to PyTorch's float32 prediction, relative to the largest prediction if that is above 1.
TOLERANCES = {"float32": 1e-5, "float16": 2e-2}
MODEL_FILE, SAMPLER_FILE = "model.onnx", "sampler.json"
BATCHES = (1, 3)  # of the comparison: no other than 2 is seen by the exporter


def export_onnx(
    pipeline: DDPMPipelineCustom,
    output_dir: Path,
    dtype: Literal["float32", "float16"] = "float32",
    *,
    for_browsers: bool = False,
    **trajectory: Any,
) -> dict[str, Any]:
    """Write `model.onnx` and `sampler.json`: all that a program in any language needs to sample.

    Args:
        pipeline: in float32, on the CPU.
        dtype: of the network's weights and arithmetic. Its inputs and its prediction are float32.
        for_browsers: with operators of onnxruntime fused already where it is in float32: it then starts sooner there.
        trajectory: the arguments of `sampler_table`.

    Returns:
        What `sampler.json` holds.

    Raises:
        ValueError: for a bad argument, a folder that can't be written to, a missing package, a network that can't be
            exported, and one whose prediction differs from PyTorch's by more than `TOLERANCES`. The files of an
            earlier export then stay.
    """
    missing = missing_packages()
    if missing:
        raise ValueError(f"exporting needs {', '.join(missing)}: pip install 'ddpm-hf[onnx]'.")
    check_writable(output_dir)
    unet = pipeline.unet
    check_free_space(output_dir, 2 * unet.num_parameters() * getattr(torch, dtype).itemsize, "the ONNX files")
    table = sampler_table(pipeline, **trajectory)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir) as folder:
        file = Path(folder) / MODEL_FILE
        write_onnx(unet, file, getattr(torch, dtype))
        table["model"] = {"file": MODEL_FILE, "weights": hash_weights(unet)}
        if for_browsers:
            table["model"]["is_optimized"] = dtype == "float32" and optimize_onnx(file)
        table["model"] |= _verify(pipeline, file, dtype)
        for written in Path(folder).iterdir():  # large networks have their weights beside them
            written.replace(output_dir / written.name)
    write_text_atomically(output_dir / SAMPLER_FILE, json.dumps(table, indent=1) + "\n")
    return table


def _verify(pipeline: DDPMPipelineCustom, file: Path, dtype: str) -> dict[str, Any]:
    """Compare the file's predictions with PyTorch's, over all timesteps and labels; the facts for `sampler.json`."""
    session, unet, tolerance = open_session(file), pipeline.unet, TOLERANCES[dtype]
    generator = torch.Generator().manual_seed(0)
    difference, largest = 0.0, 1.0
    T, classes = pipeline.scheduler.config.num_train_timesteps, unet.config.num_class_embeds
    for batch in BATCHES:
        for t in {0, T // 2, T - 1}:
            x = torch.randn(batch, unet.config.in_channels, *image_size(unet), generator=generator)
            times = (torch.full((batch,), t) - torch.arange(batch)).clamp(min=0)
            labels = torch.randint(classes, (batch,), generator=generator) if classes else None
            expected = _predict(unet, x, times, labels)
            inputs = {"x": x, "t": times, **({} if labels is None else {"class_labels": labels})}
            found = torch.from_numpy(session.run(None, {name: value.numpy() for name, value in inputs.items()})[0])
            difference = max(difference, float((found - expected).abs().nan_to_num(torch.inf).max()))
            largest = max(largest, float(expected.abs().max()))
    if difference > tolerance * largest:
        raise ValueError(
            f"the exported network differs from PyTorch's by {difference:.2g} of {largest:.2g}, but must not by more "
            f"than {tolerance:g} of it in {dtype}: "
            + ("export it in float32." if dtype == "float16" else "report it with the output of `ddpm-hf env`.")
        )
    return {"dtype": dtype, "tolerance": tolerance, "largest_difference": difference, "largest_prediction": largest}


@torch.no_grad()
def _predict(unet: torch.nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    return unet(x, t, class_labels=labels, return_dict=False)[0]
