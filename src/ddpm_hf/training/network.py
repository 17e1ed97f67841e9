"""The network of a run: diffusers' `UNet2DModel`, described by a configuration (Appendix B of arXiv 2006.11239)."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..config.training import IMAGE_MODES, TrainConfig
from ..diffusion.ddpm_labels import LABEL_NAMES

# The network of diffusers' train_unconditional.py: the default.
STOCK_UNET: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}

FOREACH_PARAMETERS = 1_000_000  # on a CPU: in larger networks, the difference of all weights falls out of its cache


def build_unet(config: TrainConfig, num_classes: int | None = None) -> UNet2DModel:
    """The network for the resolution, channels and classes of a run, with weights from torch's global generator.

    With classes it has one more embedding than there are classes: the null label of guidance, which comes last.

    Raises:
        ValueError: for a configuration that does not describe a network for these images.
    """
    channels = IMAGE_MODES[str(config.image_mode)]
    wanted = {
        "sample_size": config.resolution,
        "in_channels": channels,
        "out_channels": 2 * channels if config.variance_type == "learned_range" else channels,
        "num_class_embeds": num_classes + 1 if num_classes else None,
    }
    arguments = _arguments(config)
    for name in ("in_channels", "out_channels"):
        found = arguments.get(name)
        if found not in (None, channels, wanted[name]):
            raise ValueError(
                f"the images have {channels} channels, but {config.model_config_name_or_path or '`unet`'} has {name} "
                f"{found}: pass --channels, or change it."
            )
    if arguments.get("num_class_embeds") and not num_classes:
        raise ValueError("`unet` has num_class_embeds, but there are no labels: pass --label_column, or remove it.")
    try:
        unet = UNet2DModel.from_config({**arguments, **wanted})
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"UNet2DModel can't be built from these options: {error}") from error
    halvings = len(unet.config.block_out_channels) - 1
    if config.resolution % 2**halvings:
        raise ValueError(
            f"`resolution` is {config.resolution}, but the network halves it {halvings} times: use a multiple of "
            f"{2**halvings}."
        )
    _check_runs(unet)
    if config.enable_xformers_memory_efficient_attention:
        if importlib.util.find_spec("xformers") is None:
            raise ValueError("--enable_xformers_memory_efficient_attention needs xFormers: pip install xformers.")
        unet.enable_xformers_memory_efficient_attention()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def _check_runs(unet: UNet2DModel) -> None:
    """One forward pass without numbers, on the meta device: some networks can be built but can't run."""
    with torch.device("meta"):
        shadow = UNet2DModel.from_config(unet.config)
        x = torch.empty(1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        label = torch.zeros(1, dtype=torch.long)
    try:
        shadow(x, label, class_labels=label if unet.config.num_class_embeds else None)
    except Exception as error:  # whatever its layers raise
        raise ValueError(f"the UNet2DModel of these options can't run: {error}") from error


def _arguments(config: TrainConfig) -> dict[str, Any]:
    if config.model_config_name_or_path is not None:
        try:
            arguments = dict(UNet2DModel.load_config(config.model_config_name_or_path))
            arguments.pop(LABEL_NAMES, None)  # of the model that has lent its architecture
            return arguments
        except OSError as error:
            raise ValueError(
                f"`model_config_name_or_path` is {config.model_config_name_or_path!r}, but no configuration can be "
                f"read from there: {str(error).splitlines()[0]}"
            ) from error
    arguments = {**config.unet} if isinstance(config.unet, dict) else STOCK_UNET
    known = inspect.signature(UNet2DModel.__init__).parameters
    unknown = sorted(str(k) for k in arguments if k not in known)
    if unknown:
        raise ValueError(f"`unet` has {', '.join(unknown)}, which UNet2DModel does not have: remove it.")
    return arguments


# --- optimizer and moving average ------------------------------------------------------------------------------------


def build_optimizer(config: TrainConfig, unet: torch.nn.Module) -> torch.optim.Optimizer:
    """The fused AdamW: it skips an update by a flag on the device (`step.skip_unless_finite`)."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def build_ema(config: TrainConfig, unet: torch.nn.Module) -> EMAModel | None:
    """The exponential moving average of the weights, with the warm-up of diffusers; None without `use_ema`."""
    if not config.use_ema:
        return None
    weights = local_weights(unet)
    return EMAModel(
        weights,
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=any(w.is_cuda for w in weights) or sum(w.numel() for w in weights) <= FOREACH_PARAMETERS,
    )


@torch.no_grad()
def local_weights(unet: torch.nn.Module) -> list[Tensor]:
    """The weights that this process holds, as plain tensors that share their memory: all of them, or FSDP's shards.

    FSDP leaves weights gathered after a pass without a backward one, and would not see what changes in their shards.
    So it is made to gather them anew.
    """
    for module in unet.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return [
        weight.to_local().detach().requires_grad_() if isinstance(weight, DTensor) else weight
        for weight in unet.parameters()
    ]


@contextmanager
def ema_weights(ema: EMAModel | None, unet: torch.nn.Module) -> Iterator[None]:
    """Within this context the network has the EMA weights; its own come back whatever happens."""
    if ema is None:
        yield
        return
    weights = local_weights(unet)
    ema.store(weights)
    ema.copy_to(weights)
    try:
        yield
    finally:
        ema.restore(local_weights(unet))


def unet_with_weights(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> UNet2DModel:
    """A network around these weights, which are not copied."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval()
