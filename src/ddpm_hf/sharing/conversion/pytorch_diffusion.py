"""The network of Ho et al. (2020) as its PyTorch ports name it (pytorch_diffusion, ermongroup/ddim).

Attention has one head, normalization ε = 1e-6, the time embedding puts all sines before all cosines, with frequencies
down to 1/10000, and images are padded right and below before they are halved. `UNet2DModel` can do all of this.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .original_network import Layers, OriginalNetwork, Renaming, Weights, attend, frequencies, uniform, upsample

EPS = 1e-6
RESNET = {"norm1": "norm1", "conv1": "conv1", "temb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2"}


def is_pytorch_diffusion(weights: Weights) -> bool:
    """Whether the weights have the names of this code base."""
    return "temb.dense.0.weight" in weights and "mid.block_1.conv1.weight" in weights


def pytorch_diffusion_network(weights: Weights) -> OriginalNetwork:
    """Read the architecture from the shapes.

    Raises:
        ValueError: for what `UNet2DModel` can't express exactly.
    """
    levels = 1 + max(int(m[1]) for m in (re.match(r"down\.(\d+)\.", name) for name in weights) if m)
    blocks = uniform({_count(weights, f"down.{i}.block") for i in range(levels)}, "residual blocks per level")
    attention = [_count(weights, f"down.{i}.attn") > 0 for i in range(levels)]
    for i in range(levels - 1):
        if f"down.{i}.downsample.conv.weight" not in weights:
            raise ValueError("the network halves images without a convolution, which UNet2DModel can't: not converted.")
    config = {
        "in_channels": weights["conv_in.weight"].shape[1],
        "out_channels": weights["conv_out.weight"].shape[0],
        "block_out_channels": [weights[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
        "layers_per_block": blocks,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": EPS,
    }
    if weights["conv_in.weight"].shape[0] != config["block_out_channels"][0]:
        raise ValueError(
            "the first level has a different number of channels than the first convolution: not converted."
        )
    return OriginalNetwork(config, _rename(weights, levels, blocks), lambda x, t, labels: _forward(weights, x, t))


def _count(weights: Weights, prefix: str) -> int:
    return len({m[1] for m in (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in weights) if m})


def _rename(weights: Weights, levels: int, blocks: int) -> Weights:
    names = Renaming(weights)

    def resnet(old: str, new: str) -> None:
        names.resnet(old, new, RESNET, "nin_shortcut")

    def attention(old: str, new: str) -> None:
        if f"{old}.norm.weight" not in names.left:
            return
        names.layer(f"{old}.norm", f"{new}.group_norm")
        for a, b in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
            names.layer(f"{old}.{a}", f"{new}.{b}")
            names.renamed[f"{new}.{b}.weight"] = names.renamed[f"{new}.{b}.weight"][:, :, 0, 0]

    names.layer("temb.dense.0", "time_embedding.linear_1")
    names.layer("temb.dense.1", "time_embedding.linear_2")
    names.layer("conv_in", "conv_in")
    for i in range(levels):
        for j in range(blocks):
            resnet(f"down.{i}.block.{j}", f"down_blocks.{i}.resnets.{j}")
            attention(f"down.{i}.attn.{j}", f"down_blocks.{i}.attentions.{j}")
        if i < levels - 1:
            names.layer(f"down.{i}.downsample.conv", f"down_blocks.{i}.downsamplers.0.conv")
    resnet("mid.block_1", "mid_block.resnets.0")
    attention("mid.attn_1", "mid_block.attentions.0")
    resnet("mid.block_2", "mid_block.resnets.1")
    for i in range(levels):
        up = f"up_blocks.{levels - 1 - i}"  # theirs are numbered from the finest level, diffusers' in order of use
        for j in range(blocks + 1):
            resnet(f"up.{i}.block.{j}", f"{up}.resnets.{j}")
            attention(f"up.{i}.attn.{j}", f"{up}.attentions.{j}")
        if i > 0:
            names.layer(f"up.{i}.upsample.conv", f"{up}.upsamplers.0.conv")
    names.layer("norm_out", "conv_norm_out")
    names.layer("conv_out", "conv_out")
    return names.finish()


def _forward(weights: Weights, x: Tensor, t: Tensor) -> Tensor:
    w = Layers(weights, x.dtype, EPS)
    channels = weights["conv_in.weight"].shape[0]
    angles = frequencies(t, channels, last=channels // 2 - 1)
    emb = torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)
    emb = w.linear("temb.dense.1", F.silu(w.linear("temb.dense.0", emb)))

    levels = range(1 + max(int(name.split(".")[1]) for name in weights if name.startswith("down.")))
    skips = [w.conv("conv_in", x)]
    for i in levels:
        for j in range(_count(weights, f"down.{i}.block")):
            skips.append(_attention(w, f"down.{i}.attn.{j}", _resnet(w, f"down.{i}.block.{j}", skips[-1], emb)))
        if i != levels[-1]:
            padded = F.pad(skips[-1], (0, 1, 0, 1))
            skips.append(w.conv(f"down.{i}.downsample.conv", padded, stride=2, padding=0))

    h = _resnet(w, "mid.block_1", skips[-1], emb)
    h = _resnet(w, "mid.block_2", _attention(w, "mid.attn_1", h), emb)

    for i in reversed(levels):
        for j in range(_count(weights, f"up.{i}.block")):
            h = _resnet(w, f"up.{i}.block.{j}", torch.cat([h, skips.pop()], dim=1), emb)
            h = _attention(w, f"up.{i}.attn.{j}", h)
        if i > 0:
            h = w.conv(f"up.{i}.upsample.conv", upsample(h))
    return w.conv("conv_out", F.silu(w.group_norm("norm_out", h)))


def _resnet(w: Layers, name: str, x: Tensor, emb: Tensor) -> Tensor:
    h = w.conv(f"{name}.conv1", F.silu(w.group_norm(f"{name}.norm1", x)))
    h = h + w.linear(f"{name}.temb_proj", F.silu(emb))[:, :, None, None]
    h = w.conv(f"{name}.conv2", F.silu(w.group_norm(f"{name}.norm2", h)))
    return h + (w.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut" in w else x)


def _attention(w: Layers, name: str, x: Tensor) -> Tensor:
    """Self-attention over the pixels with one head; nothing where this level has none."""
    if f"{name}.norm" not in w:
        return x
    h = w.group_norm(f"{name}.norm", x)
    h = attend(*(w.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")).reshape(x.shape)
    return x + w.conv(f"{name}.proj_out", h)
