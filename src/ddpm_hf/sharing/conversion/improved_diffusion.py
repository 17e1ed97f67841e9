"""The network of improved-diffusion (Nichol, Dhariwal 2021, arXiv 2102.09672).

Its weights do not show the number of attention heads; the queries, keys and values of a head are in one matrix.
`UNet2DModel` has heads of one size, so a network whose levels with attention differ in channels can't be converted.
Nor can one that was trained with T ≠ 1000, because its code rescales t and `UNet2DModel` does not.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .original_network import Layers, OriginalNetwork, Renaming, Weights, attend, frequencies, uniform, upsample

EPS = 1e-5
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}  # fmt: skip


def is_improved_diffusion(weights: Weights) -> bool:
    """Whether the weights have the names of this code base."""
    return "time_embed.0.weight" in weights and "input_blocks.0.0.weight" in weights


def improved_diffusion_network(weights: Weights, num_heads: int) -> OriginalNetwork:
    """Read the architecture from the shapes.

    Raises:
        ValueError: for what `UNet2DModel` can't express exactly.
    """
    blocks = 1 + max(int(m[1]) for m in (re.match(r"input_blocks\.(\d+)\.", name) for name in weights) if m)
    halvings = [i for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in weights]
    if not halvings:
        raise ValueError(
            "the network does not halve images by convolutions (conv_resample=False, or guided-diffusion's "
            "resblock_updown), which this conversion can't express: not converted."
        )
    ends = [*halvings, blocks]
    levels = [range(start + 1, end) for start, end in zip([0, *halvings], ends, strict=True)]
    per_level = uniform({len(level) for level in levels}, "residual blocks per level")
    attention = [
        uniform({f"input_blocks.{i}.1.qkv.weight" in weights for i in level}, "attention in the blocks of a level")
        for level in levels
    ]
    channels = [weights[f"input_blocks.{level[0]}.0.out_layers.3.weight"].shape[0] for level in levels]
    scale_shift = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * channels[0]
    config: dict[str, Any] = {
        "in_channels": weights["input_blocks.0.0.weight"].shape[1],
        "out_channels": weights["out.2.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": per_level,
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
        "attention_head_dim": _head_size(weights, num_heads),
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "norm_eps": EPS,
    }
    if weights["input_blocks.0.0.weight"].shape[0] != channels[0]:
        raise ValueError(
            "the first level has a different number of channels than the first convolution: not converted."
        )
    if "label_emb.weight" in weights:
        config["num_class_embeds"] = weights["label_emb.weight"].shape[0]
    return OriginalNetwork(
        config,
        _rename(weights, levels, num_heads),
        lambda x, t, labels: _forward(weights, x, t, labels, num_heads),
    )


def _head_size(weights: Weights, num_heads: int) -> int:
    sizes = {w.shape[1] / num_heads for name, w in weights.items() if name.endswith(".qkv.weight")}
    size = uniform(sizes, f"channels per head (of {num_heads} heads)")
    if size != int(size):
        raise ValueError(f"`num_heads` is {num_heads}, which does not divide the channels of the attention.")
    return int(size)


def _rename(weights: Weights, levels: list[range], num_heads: int) -> Weights:
    names = Renaming(weights)

    def resnet(old: str, new: str) -> None:
        names.resnet(old, new, RESNET, "skip_connection")

    def attention(old: str, new: str) -> None:
        if f"{old}.qkv.weight" not in names.left:
            return
        names.layer(f"{old}.norm", f"{new}.group_norm")
        for part in ("weight", "bias"):
            qkv = names.take(f"{old}.qkv.{part}").flatten(1) if part == "weight" else names.take(f"{old}.qkv.{part}")
            q, k, v = qkv.unflatten(0, (num_heads, 3, -1)).unbind(1)
            for name, tensor in (("to_q", q), ("to_k", k), ("to_v", v)):
                names.renamed[f"{new}.{name}.{part}"] = tensor.flatten(0, 1)
        names.layer(f"{old}.proj_out", f"{new}.to_out.0")
        names.renamed[f"{new}.to_out.0.weight"] = names.renamed[f"{new}.to_out.0.weight"][:, :, 0]

    names.layer("time_embed.0", "time_embedding.linear_1")
    names.layer("time_embed.2", "time_embedding.linear_2")
    if "label_emb.weight" in names.left:
        names.renamed["class_embedding.weight"] = names.take("label_emb.weight")
    names.layer("input_blocks.0.0", "conv_in")
    for n, level in enumerate(levels):
        for j, i in enumerate(level):
            resnet(f"input_blocks.{i}.0", f"down_blocks.{n}.resnets.{j}")
            attention(f"input_blocks.{i}.1", f"down_blocks.{n}.attentions.{j}")
        if n < len(levels) - 1:
            names.layer(f"input_blocks.{level[-1] + 1}.0.op", f"down_blocks.{n}.downsamplers.0.conv")
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    per_level = len(levels[0]) + 1
    for n in range(len(levels)):
        for j in range(per_level):
            old = f"output_blocks.{n * per_level + j}"
            resnet(f"{old}.0", f"up_blocks.{n}.resnets.{j}")
            attention(f"{old}.1", f"up_blocks.{n}.attentions.{j}")
        last = next((f"{old}.{k}.conv" for k in (1, 2) if f"{old}.{k}.conv.weight" in names.left), None)
        if last is not None:
            names.layer(last, f"up_blocks.{n}.upsamplers.0.conv")
    names.layer("out.0", "conv_norm_out")
    names.layer("out.2", "conv_out")
    return names.finish()


def _forward(weights: Weights, x: Tensor, t: Tensor, labels: Tensor | None, num_heads: int) -> Tensor:
    w = Layers(weights, x.dtype, EPS)
    channels = weights["time_embed.0.weight"].shape[1]
    angles = frequencies(t, channels, last=channels // 2)
    emb = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    emb = w.linear("time_embed.2", F.silu(w.linear("time_embed.0", emb)))
    if labels is not None:
        emb = emb + w.weights["label_emb.weight"][labels]

    def block(name: str, h: Tensor) -> Tensor:
        """The layers of a block, in order, whatever they are."""
        for part in (f"{name}.{k}" for k in range(3)):
            if f"{part}.in_layers.0" in w:
                h = _resnet(w, part, h, emb)
            elif f"{part}.qkv" in w:
                h = _attention(w, part, h, num_heads)
            elif f"{part}.op" in w:
                h = w.conv(f"{part}.op", h, stride=2)
            elif f"{part}.conv" in w:
                h = w.conv(f"{part}.conv", upsample(h))
        return h

    skips = [w.conv("input_blocks.0.0", x)]
    for i in range(1, len({name.split(".")[1] for name in weights if name.startswith("input_blocks.")})):
        skips.append(block(f"input_blocks.{i}", skips[-1]))
    h = block("middle_block", skips[-1])
    for i in range(len(skips)):
        h = block(f"output_blocks.{i}", torch.cat([h, skips.pop()], dim=1))
    return w.conv("out.2", F.silu(w.group_norm("out.0", h)))


def _resnet(w: Layers, name: str, x: Tensor, emb: Tensor) -> Tensor:
    h = w.conv(f"{name}.in_layers.2", F.silu(w.group_norm(f"{name}.in_layers.0", x)))
    shift = w.linear(f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
    if shift.shape[1] == h.shape[1]:
        h = w.group_norm(f"{name}.out_layers.0", h + shift)
    else:
        scale, shift = shift.chunk(2, dim=1)
        h = w.group_norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
    h = w.conv(f"{name}.out_layers.3", F.silu(h))
    return h + (w.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection" in w else x)


def _attention(w: Layers, name: str, x: Tensor, num_heads: int) -> Tensor:
    qkv = w.conv(f"{name}.qkv", w.group_norm(f"{name}.norm", x))
    q, k, v = qkv.flatten(2).unflatten(1, (num_heads, 3, -1)).unbind(2)  # (B, heads, channels of a head, pixels)
    return x + w.conv(f"{name}.proj_out", attend(q, k, v).reshape(x.shape))
