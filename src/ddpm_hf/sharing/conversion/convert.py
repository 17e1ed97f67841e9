"""Convert models of other people into repositories that load three ways, and verify that their outputs are equal."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, UNet2DModel
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...config.commands import ConvertConfig
from ...diffusion.pipeline import DDPMPipelineCustom, image_size
from ...diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ...storage.files import check_writable, full_disk_explained
from ...storage.loading import load_pipeline, stored_dtype
from ...storage.weights import size_of
from ..card import CardFacts, write_card
from .improved_diffusion import improved_diffusion_network, is_improved_diffusion
from .original_network import Forward, OriginalNetwork, Weights
from .pytorch_diffusion import is_pytorch_diffusion, pytorch_diffusion_network

TOLERANCE = 1e-9  # relative, in float64: a wrong ε, padding or order of heads is off by far more


def convert_model(model: str, destination: Path, config: ConvertConfig) -> Path:
    """Write `model` as a saved pipeline into `destination`, which must be new or empty.

    Args:
        model: a DDPM of diffusers (folder or Hub id), a training checkpoint of ours or of diffusers' script, or a
            weight file (.pt, .pth, .ckpt, .bin, .safetensors) of a network that `UNet2DModel` can express.

    Returns:
        The destination.

    Raises:
        ValueError: where there is no such model, it can't be expressed exactly, or outputs differ. Nothing is written
            then.
    """
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise ValueError(f"the destination {str(destination)!r} exists: name a new folder.")
    check_writable(destination)
    is_file = Path(model).is_file()
    if is_file:
        pipeline, reference = _from_weight_file(Path(model), config)
        facts = CardFacts()
    else:
        _refuse_file_options(config)
        folder = Path(model)
        dtype = stored_dtype(folder) if folder.is_dir() else torch.float32
        pipeline = load_pipeline(model, config.revision, dtype)
        reference, facts = _forward_of(pipeline.unet), _known_facts(model, config.revision)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".ddpm-hf-convert-", dir=destination.parent) as place:
        stage = Path(place) / "model"
        with full_disk_explained(destination, size_of(pipeline.unet.parameters())):
            pipeline.save_pretrained(stage)
        for loader in (DDPMPipeline, DDPMPipelineCustom):
            saved = loader.from_pretrained(stage, dtype=pipeline.unet.dtype).unet
            _check_equal(reference, saved, torch.float64 if is_file else saved.dtype)
        write_card(stage, facts)
        if destination.exists():
            destination.rmdir()
        stage.rename(destination)
    return destination


# --- weight files --------------------------------------------------------------------------------------------------


def _from_weight_file(file: Path, config: ConvertConfig) -> tuple[DDPMPipelineCustom, Forward]:
    weights = read_weights(file)
    network = _original_network(weights, config)
    if config.resolution is None:
        raise ValueError("a weight file does not record the size of images: pass --resolution, e.g. 32.")
    unet = UNet2DModel(sample_size=config.resolution, **network.config).eval()
    unet.load_state_dict(network.weights)
    learned = unet.config.out_channels == 2 * unet.config.in_channels
    scheduler = DDPMSchedulerCustom(
        config.ddpm_num_steps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        variance_type="learned_range" if learned else config.variance_type,
    )
    return DDPMPipelineCustom(unet, scheduler), network.forward


def _original_network(weights: Weights, config: ConvertConfig) -> OriginalNetwork:
    if is_pytorch_diffusion(weights):
        return pytorch_diffusion_network(weights)
    if not is_improved_diffusion(weights):
        raise ValueError(
            f"the weight file has an unknown architecture (its first tensor is {next(iter(weights), 'missing')!r}): "
            "supported are the PyTorch ports of DDPM (Ho et al. 2020) and improved-diffusion."
        )
    if config.num_heads is None:
        raise ValueError("improved-diffusion's weights do not record the number of attention heads: pass --num_heads.")
    if config.ddpm_num_steps != 1000:
        raise ValueError(
            f"`ddpm_num_steps` is {config.ddpm_num_steps}, but improved-diffusion rescales t to 0 … 1000 and "
            "UNet2DModel does not: only models trained with 1000 steps can be converted exactly."
        )
    return improved_diffusion_network(weights, config.num_heads)


def read_weights(file: Path) -> Weights:
    """The tensors of a weight file, in float32; of a training state, those of the EMA if there is one.

    Raises:
        ValueError: for a file that holds anything but tensors and plain containers. None of its code is executed.
    """
    try:
        if file.suffix == ".safetensors":
            found = load_file(file)
        else:
            found = _state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), "it is empty or cut off")
        raise ValueError(
            f"{str(file)!r} can't be read as plain weights ({reason}). Pickles that run code are never loaded: "
            "save the state dict alone, with safetensors or torch.save."
        ) from error
    return {name.removeprefix("module."): tensor.float() for name, tensor in found.items()}


def _state_dict(content: Any) -> Weights:
    """The weights in the content of a file: itself, or a part of a dictionary, or the last of a list (the EMA's)."""
    if isinstance(content, Mapping):
        if content and _are_weights(content):
            return dict(content)
        inner = [content[key] for key in ("ema", "ema_state_dict", "state_dict", "model") if key in content]
    else:
        inner = list(reversed(content)) if isinstance(content, (list, tuple)) else []
    for part in inner:
        if isinstance(part, Mapping) and part and _are_weights(part):
            return dict(part)
    raise OSError("it has no dictionary of tensors")


def _are_weights(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _refuse_file_options(config: ConvertConfig) -> None:
    defaults = asdict(ConvertConfig())
    given = [k for k, v in asdict(config).items() if v != defaults[k] and k != "revision"]
    if given:
        raise ValueError(
            f"`{given[0]}` is only for weight files: a diffusers model has its own configuration. Leave it out."
        )


# --- equality ------------------------------------------------------------------------------------------------------


def _forward_of(unet: UNet2DModel) -> Forward:
    return lambda x, t, labels: unet(x, t, class_labels=labels).sample


@torch.no_grad()
def _check_equal(reference: Forward, unet: UNet2DModel, dtype: torch.dtype) -> None:
    """Raise a ValueError unless the network's outputs equal the reference's: bit for bit, or to float64's rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, unet.config.in_channels, *image_size(unet), generator=generator).to(dtype)
    classes = unet.config.num_class_embeds
    labels = torch.tensor([0, classes - 1]) if classes else None
    unet = unet.double() if dtype == torch.float64 else unet
    for t in (torch.tensor([0, 1]), torch.tensor([499, 998])):
        expected, actual = reference(x, t, labels), unet(x, t, class_labels=labels).sample
        error = float((expected - actual).abs().max() / expected.abs().max().clamp_min(torch.finfo(dtype).tiny))
        if not error <= (TOLERANCE if dtype == torch.float64 else 0.0):
            raise ValueError(
                f"the converted network's outputs differ from the original's by {error:.1e}: not converted."
            )


# --- the card ------------------------------------------------------------------------------------------------------


def _known_facts(model: str, revision: str | None) -> CardFacts:
    """The license and data of a model by its own card, and its id on the Hub."""
    folder = Path(model)
    facts = CardFacts(base_model=None if folder.is_dir() else model)
    try:
        file = folder / "README.md" if folder.is_dir() else hf_hub_download(model, "README.md", revision=revision)
        data = ModelCard.load(Path(file), ignore_metadata_errors=True).data
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return facts
    datasets = data.datasets or []
    return replace(
        facts,
        license=data.license if isinstance(data.license, str) else None,
        dataset_ids=[datasets] if isinstance(datasets, str) else datasets,
    )
