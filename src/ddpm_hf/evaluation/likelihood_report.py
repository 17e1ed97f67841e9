"""The likelihood of an evaluation: measured in parts, which survive an interruption; as numbers, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from ..data.pixels import LEVELS_PER_UNIT
from ..diffusion.pipeline import DDPMPipelineCustom
from ..storage.files import read_json, write_text_atomically
from .likelihood import BitsPerDim, bits_per_dim, combine, rate_distortion
from .plots import save_bits_per_dim, save_rate_distortion
from .predictions import draw_indices

MAX_PARTS = 16


def resumable_bits_per_dim(
    pipe: DDPMPipelineCustom,
    images: Tensor,
    folder: Path,
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    class_labels: Tensor | None = None,
    show_progress: bool = True,
    **chain: Any,
) -> BitsPerDim:
    """`bits_per_dim` of `num_images` images, measured in up to sixteen parts, each stored as soon as it is finished.

    Args:
        folder: for the parts of this model, data and options. An estimate is measured in one go.
        chain: further arguments of `bits_per_dim`.
    """
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "class_labels": class_labels, **chain}
    if chain.get("calls_per_image") is not None:
        return bits_per_dim(pipe, images, num_images=num_images, show_progress=show_progress, **options)
    state = PartialState()
    parts = split_evenly(draw_indices(len(images), num_images, seed), batch_size * state.num_processes)
    measured = []
    for i, part in enumerate(parts):
        file = folder / f"{int(part[0])}-{int(part[-1])}-{len(part)}.json"
        if file.is_file():
            measured.append(_read(file))
            continue
        title = f"Likelihood, part {i + 1} of {len(parts)}" if len(parts) > 1 else "Likelihood"
        bits = bits_per_dim(pipe, images, indices=part, title=title, show_progress=show_progress, **options)
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomically(file, json.dumps(asdict(replace(bits, of_images=None)), default=Tensor.tolist))
        measured.append(bits)
    return combine(measured)


def split_evenly(indices: Tensor, unit: int) -> Sequence[Tensor]:
    """At most 16 parts of at least two images; all but the last are a multiple of `unit`."""
    size = -(-len(indices) // (MAX_PARTS * unit)) * unit
    parts = list(indices.split(max(2, size)))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _read(file: Path) -> BitsPerDim:
    try:
        stored = read_json(file)
        tables = {name: torch.tensor(stored[name], dtype=torch.float64) for name in ("terms", "x_0_mse", "eps_mse")}
        return BitsPerDim(**(stored | tables))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}): remove it, and it is measured again.") from error


def likelihood_details(bits: BitsPerDim) -> dict[str, Any]:
    """The terms of the bound, in bits/dim, and the distortion of the lossy code (Section 4.3)."""
    rate = bits.total - bits.L_0
    return {
        "L_T": bits.L_T,
        "rate": rate,
        "L_0": bits.L_0,
        "distortion_rmse": float(bits.x_0_mse[-1].sqrt() * LEVELS_PER_UNIT),
        "calls_per_image": bits.calls_per_image,
    }


def save_likelihood(bits: BitsPerDim, place: Path) -> None:
    """Write `likelihood.json` and the plots; rate and distortion only if no timestep was left out."""
    tables: dict[str, Sequence[Any]] = {
        "timesteps": bits.timesteps,
        "bits_per_dim": _rounded(bits.terms),
        "x_0_mse": _rounded(bits.x_0_mse),
        "eps_mse": _rounded(bits.eps_mse),
    }
    save_bits_per_dim(bits, place / "bits_per_dim.png")
    if not bits.terms.isnan().any():
        curve = rate_distortion(bits)
        tables |= {"rate": _rounded(curve.rate), "distortion_rmse": _rounded(curve.distortion)}
        save_rate_distortion(curve, place / "rate_distortion.png")
    lines = ",\n".join(f' "{name}": {json.dumps(values)}' for name, values in tables.items())
    write_text_atomically(place / "likelihood.json", f"{{\n{lines}\n}}\n")


def _rounded(table: Tensor) -> list[float | None]:
    return [None if value != value else float(f"{value:.6g}") for value in table.tolist()]
