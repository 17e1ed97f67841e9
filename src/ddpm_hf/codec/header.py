"""What a file says of the model it needs, identity, chain and arithmetic, and how a decoder checks it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..diffusion.ddpm_process import LEARNED_VARIANCE_TYPES, VarianceType
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..evaluation.likelihood import ReverseChain
from ..storage.weights import hash_weights
from .arithmetic import check_arithmetic, describe_arithmetic, probe
from .levels import hash_levels, make_levels
from .lossless import Model

ERROR_STEPS = 128  # e_t is stored as 2^(j / 128): 0.3 % of a variance cost 3e-6 bits per value and step
MAX_BATCH_SIZE = 65_536


def choose_variance(pipeline: DDPMPipelineCustom) -> VarianceType:
    """The best variance that a model has: a learned one, or the optimal one of its calibration."""
    own: VarianceType = pipeline.scheduler.variance_type
    return own if own in LEARNED_VARIANCE_TYPES else "optimal"


def make_model(
    pipeline: DDPMPipelineCustom, num_inference_steps: int | None, timesteps: Sequence[int] | Tensor | str | None,
    variance_type: VarianceType | None, bins_per_std: int, class_label: int | None,
) -> Model:  # fmt: skip
    """A model to encode with; errors of its calibration are rounded to what a file stores."""
    chain = ReverseChain(pipeline, num_inference_steps, timesteps, variance_type or choose_variance(pipeline))
    if chain.x_0_error is not None:
        chain.x_0_error = _read_errors(chain, _errors(chain))
    return Model(pipeline, chain, make_levels(chain, bins_per_std), class_label)


def describe_model(
    model: Model, bins_per_std: int, batch_sizes: Sequence[int], name: str | None, revision: str | None
) -> dict[str, Any]:
    """The part of a header that is about the model. To be called within `repeatable_arithmetic`.

    Args:
        batch_sizes: those of all network calls.
        name: of the model, to be found by `decompress` where none is given.
    """
    pipeline, chain = model.pipeline, model.chain
    shape = image_shape(pipeline)
    return {
        "by": f"ddpm-hf {__version__}",
        "shape": list(shape),
        "model": {
            "name": name,
            "revision": revision,
            "weights": hash_weights(pipeline.unet),
            "label": model.class_label,
        },
        "chain": {
            "timesteps": chain.timesteps.tolist(),
            "variance": chain.variance_type,
            "errors": None if chain.x_0_error is None else _errors(chain),
            "bins": bins_per_std,
            "table": hash_levels(model.levels),
        },
        "arithmetic": {
            **describe_arithmetic(pipeline.unet),
            "probe": probe(pipeline.unet, shape, chain.timesteps.tolist(), batch_sizes, model.class_label),
        },
    }


def open_model(header: dict[str, Any], pipeline: DDPMPipelineCustom, batch_sizes: Sequence[int]) -> Model:
    """The model that a file was made with, after every check. To be called within `repeatable_arithmetic`.

    Raises:
        ValueError: for another model, schedule or arithmetic than that of the file.
    """
    stored, chain_of_file = _mapping(header, "model"), _mapping(header, "chain")
    weights = hash_weights(pipeline.unet)
    if stored.get("weights") != weights:
        raise ValueError(
            f"the file was made with the model {stored.get('name')!r} of weights {str(stored.get('weights'))[:12]}…, "
            f"but this one has {weights[:12]}…: pass that model, in that state."
        )
    shape = image_shape(pipeline)
    if header.get("shape") != list(shape):
        raise ValueError(f"the file has images of {header.get('shape')} (C, H, W), but the model makes {list(shape)}.")
    chain = _read_chain(pipeline, chain_of_file)
    levels = make_levels(chain, _integer(chain_of_file, "bins", 1, 2**12))
    if hash_levels(levels) != chain_of_file.get("table"):
        raise ValueError(
            "the coefficients of the file's chain are not those of this model's scheduler: its schedule of betas, "
            "`prediction_type` or T was changed since. Pass the model as it was when the file was made."
        )
    label = None if stored.get("label") is None else _integer(stored, "label", 0, 2**31)
    found = probe(pipeline.unet, shape, chain.timesteps.tolist(), batch_sizes, label)
    check_arithmetic(_mapping(header, "arithmetic"), pipeline.unet, found)
    return Model(pipeline, chain, levels, label)


class ModelOfFile(NamedTuple):
    """Where the model of a file is to be found, and what it computes on; None where the file does not say."""

    name: str | None
    revision: str | None
    device: str | None


def model_of(header: dict[str, Any]) -> ModelOfFile:
    """The model that a file names."""
    stored = _mapping(header, "model")
    name, revision = (
        read_field(stored, key, lambda v: v is None or isinstance(v, str)) for key in ("name", "revision")
    )
    is_of_cpu = _mapping(header, "arithmetic").get("device") == "cpu"
    return ModelOfFile(name, revision, "cpu" if is_of_cpu else None)


def image_shape(pipeline: DDPMPipelineCustom) -> tuple[int, int, int]:
    """(C, H, W) of the images of a model."""
    return (pipeline.unet.config.in_channels, *image_size(pipeline.unet))


def hash_pixels(pictures: Sequence[Any]) -> str:
    """SHA-256 of the pixels of images, uint8 (C, H, W), with their shapes."""
    digest = hashlib.sha256()
    for pixels in pictures:
        digest.update(f"{list(pixels.shape)}".encode())
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def read_field(header: dict[str, Any], name: str, is_valid: Callable[[Any], bool]) -> Any:
    """A field of a header, whoever wrote it.

    Raises:
        ValueError: unless it is valid.
    """
    value = header.get(name)
    if not is_valid(value):
        raise ValueError(f"the file's header has {name} = {value!r:.80}, which no ddpm-hf writes: it can't be decoded.")
    return value


def _mapping(header: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_field(header, name, lambda v: isinstance(v, dict))
    return found


def _integer(header: dict[str, Any], name: str, lowest: int, highest: int) -> int:
    return int(read_field(header, name, lambda v: type(v) is int and lowest <= v <= highest))


def _read_chain(pipeline: DDPMPipelineCustom, stored: dict[str, Any]) -> ReverseChain:
    T = pipeline.scheduler.config.num_train_timesteps
    timesteps = read_field(stored, "timesteps", lambda v: _are_integers(v, 0, 10**6))
    if max(timesteps) >= T:
        raise ValueError(f"the file's chain starts at timestep {max(timesteps)}, but the model has T = {T}.")
    variance: Any = read_field(stored, "variance", lambda v: isinstance(v, str))
    is_optimal = variance == "optimal"
    fits = (
        (lambda v: _are_integers(v, -10_000, 10_000) and len(v) == len(timesteps))
        if is_optimal
        else (lambda v: v is None)
    )
    errors = read_field(stored, "errors", fits)
    table = None if errors is None else torch.ones(T, dtype=torch.float64)
    chain = ReverseChain(pipeline, None, timesteps, variance, x_0_error=table)
    if errors is not None:
        chain.x_0_error = _read_errors(chain, errors)
    return chain


def _are_integers(values: Any, lowest: int, highest: int) -> bool:
    return isinstance(values, list) and bool(values) and all(type(v) is int and lowest <= v <= highest for v in values)


def _errors(chain: ReverseChain) -> list[int]:
    """Log₂ e_t of the chain's timesteps, in 1/128."""
    errors = [] if chain.x_0_error is None else chain.x_0_error[chain.timesteps].tolist()
    return [round(ERROR_STEPS * math.log2(max(error, 1e-12))) for error in errors]


def _read_errors(chain: ReverseChain, errors: Sequence[int]) -> Tensor:
    table = torch.ones(len(chain.scheduler), dtype=torch.float64)
    table[chain.timesteps] = torch.tensor([2.0 ** (e / ERROR_STEPS) for e in errors], dtype=torch.float64)
    return table
