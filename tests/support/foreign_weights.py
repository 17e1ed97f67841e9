"""Tiny weight files as other code bases write them, filled by a formula, and the outputs of those code bases.

The figures in FIGURES were computed once, in float64, by the code of openai/improved-diffusion and ermongroup/ddim with
these very weights (all names and shapes fit). They are the only link to that code: it is no part of this project.
"""

import torch

CHANNELS, EMB = (32, 64), 128
FIGURES = {
    "improved": [0.1629574, 0.2064867, 0.2046989, -0.0651828, -0.534562],
    "improved, shift only, one head": [0.2555608, 0.0416315, 0.1656791, 0.0519412, -0.8234476],
    "improved, classes, learned variance": [0.1876381, -0.0102927, -0.0779246, -0.296095, 0.3354701],
    "ho": [0.0150034, -0.1195579, 0.0060821, -0.6589518, 0.1807339],
}


def fill(shapes):
    """Weights from a formula instead of a random generator: the same in every release of torch."""
    weights = {}
    for k, (name, shape) in enumerate(shapes.items()):
        count = torch.Size(shape).numel()
        values = torch.sin(torch.arange(count, dtype=torch.float64) * (1.3 + 0.01 * k) + k) * 0.12
        weights[name] = (values + (1 if len(shape) == 1 and name.endswith("weight") else 0)).reshape(shape).float()
    return weights


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def improved(heads=2, scale_shift=True, classes=None, outputs=3):
    """improved-diffusion: channels 32 and 64, one block per level, attention at the second level."""

    def resnet(name, a, b):
        return {
            **layer(f"{name}.in_layers.0", a), **layer(f"{name}.in_layers.2", b, a, 3, 3),
            **layer(f"{name}.emb_layers.1", b * (2 if scale_shift else 1), EMB), **layer(f"{name}.out_layers.0", b),
            **layer(f"{name}.out_layers.3", b, b, 3, 3),
            **(layer(f"{name}.skip_connection", b, a, 1, 1) if a != b else {}),
        }  # fmt: skip

    def attention(name, c):
        qkv, out = layer(f"{name}.qkv", 3 * c, c, 1), layer(f"{name}.proj_out", c, c, 1)
        return {**layer(f"{name}.norm", c), **qkv, **out}

    a, b = CHANNELS
    return fill({
        **layer("time_embed.0", EMB, a), **layer("time_embed.2", EMB, EMB),
        **({"label_emb.weight": (classes, EMB)} if classes else {}),
        **layer("input_blocks.0.0", a, 3, 3, 3), **resnet("input_blocks.1.0", a, a),
        **layer("input_blocks.2.0.op", a, a, 3, 3),
        **resnet("input_blocks.3.0", a, b), **attention("input_blocks.3.1", b),
        **resnet("middle_block.0", b, b), **attention("middle_block.1", b), **resnet("middle_block.2", b, b),
        **resnet("output_blocks.0.0", b + b, b), **attention("output_blocks.0.1", b),
        **resnet("output_blocks.1.0", b + a, b), **attention("output_blocks.1.1", b),
        **layer("output_blocks.1.2.conv", b, b, 3, 3),
        **resnet("output_blocks.2.0", b + a, a), **resnet("output_blocks.3.0", a + a, a),
        **layer("out.0", a), **layer("out.2", outputs, a, 3, 3),
    })  # fmt: skip


def ho():
    """The PyTorch ports of Ho et al.: channels 32 and 64, one block per level, attention at the second level."""

    def resnet(name, a, b):
        return {
            **layer(f"{name}.norm1", a), **layer(f"{name}.conv1", b, a, 3, 3), **layer(f"{name}.temb_proj", b, EMB),
            **layer(f"{name}.norm2", b), **layer(f"{name}.conv2", b, b, 3, 3),
            **(layer(f"{name}.nin_shortcut", b, a, 1, 1) if a != b else {}),
        }  # fmt: skip

    def attention(name, c):
        parts = {}
        for part in ("q", "k", "v", "proj_out"):
            parts |= layer(f"{name}.{part}", c, c, 1, 1)
        return {**layer(f"{name}.norm", c), **parts}

    a, b = CHANNELS
    return fill({
        **layer("temb.dense.0", EMB, a), **layer("temb.dense.1", EMB, EMB), **layer("conv_in", a, 3, 3, 3),
        **resnet("down.0.block.0", a, a), **layer("down.0.downsample.conv", a, a, 3, 3),
        **resnet("down.1.block.0", a, b), **attention("down.1.attn.0", b),
        **resnet("mid.block_1", b, b), **attention("mid.attn_1", b), **resnet("mid.block_2", b, b),
        **resnet("up.0.block.0", b + a, a), **resnet("up.0.block.1", a + a, a),
        **resnet("up.1.block.0", b + b, b), **attention("up.1.attn.0", b),
        **resnet("up.1.block.1", b + a, b), **attention("up.1.attn.1", b), **layer("up.1.upsample.conv", b, b, 3, 3),
        **layer("norm_out", a), **layer("conv_out", 3, a, 3, 3),
    })  # fmt: skip


STYLES = {
    "improved": lambda: improved(),
    "improved, shift only, one head": lambda: improved(heads=1, scale_shift=False),
    "improved, classes, learned variance": lambda: improved(classes=5, outputs=6),
    "ho": ho,
}


def probe():
    """x of shape (1, 3, 8, 8), t and a label to compute outputs for."""
    return torch.cos(torch.arange(192, dtype=torch.float64) * 0.7).reshape(1, 3, 8, 8), torch.tensor([321]), 3


def figures(output):
    """Five values at places of (1, C, 8, 8) that any wrong padding, order or ε changes."""
    return [round(float(output[0, c, i, j]), 7) for c, i, j in ((0, 0, 0), (1, 0, 7), (2, 7, 0), (0, 7, 7), (1, 3, 4))]
