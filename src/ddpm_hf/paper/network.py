"""The U-Net as a drawing: its blocks and their shapes, read off the network while it runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .canvas import new_figure
from .figure import Drawn, PaperFigure
from .job import Job, small


class Block(NamedTuple):
    """A block, and the shape (C, H, W) of what it gave out."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int


def read_blocks(unet: Any, shape: tuple[int, ...]) -> list[Block]:
    """Run the network once, on an image of zeros, and note what each of its blocks gives out, in order.

    Args:
        unet: a `UNet2DModel`.
        shape: (C, H, W) of an image.
    """
    blocks: list[Block] = []

    def note(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: object, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            size = sum(p.numel() for p in module.parameters())
            blocks.append(Block(name, type(module).__name__, tuple(tensor.shape[1:]), size))

        return hook

    named = [("conv_in", unet.conv_in)]
    named += [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    named += [("mid_block", unet.mid_block)] if unet.mid_block is not None else []
    named += [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    named += [("conv_out", unet.conv_out)]
    handles = [module.register_forward_hook(note(name)) for name, module in named]
    labels = None
    if unet.config.num_class_embeds is not None:
        labels = torch.zeros(1, dtype=torch.long, device=unet.device)
    try:
        with torch.no_grad():
            unet(torch.zeros(1, *shape, device=unet.device, dtype=unet.dtype), 0, class_labels=labels)
    finally:
        for handle in handles:
            handle.remove()
    return blocks


def _draw(job: Job, file: Path) -> Drawn:
    from matplotlib.patches import FancyBboxPatch

    shape = small(job)
    blocks = read_blocks(job.pipeline.unet, shape)
    sides = sorted({b.shape[1] for b in blocks} | {shape[1]}, reverse=True)
    places = {b.name: (i, -sides.index(b.shape[1])) for i, b in enumerate(blocks)}
    figure = new_figure(max(8, 1.75 * len(blocks)), 1.35 * len(sides) + 1.2)
    axes = figure.subplots()
    colours = {"Attn": "#f6d7a8", "Mid": "#d9c8ec", "Conv": "#dddddd"}
    for block in blocks:
        x, y = places[block.name]
        colour = next((c for key, c in colours.items() if key in block.kind), "#bcd8f0")
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.42, y - 0.27), 0.84, 0.54, boxstyle="round,pad=0.03", facecolor=colour, edgecolor="0.4"
            )
        )
        kind = block.kind.removesuffix("2D").replace("UNetMidBlock", "MidBlock")
        axes.text(
            x,
            y,
            f"{kind}\n{' × '.join(map(str, block.shape))}\n{block.parameters:,}",
            ha="center",
            va="center",
            fontsize=8,
        )
    arrow = {"arrowstyle": "->", "color": "0.3"}
    for a, b in pairwise(blocks):
        (x, y), (u, v) = places[a.name], places[b.name]
        axes.annotate("", xy=(u - 0.46, v), xytext=(x + 0.46, y), arrowprops=arrow)
    downs = [b for b in blocks if b.name.startswith("down")]
    ups = [b for b in blocks if b.name.startswith("up")]
    for i, (down, up) in enumerate(zip(downs, reversed(ups), strict=False)):
        (x, _), (u, _) = places[down.name], places[up.name]
        axes.annotate(
            "", xy=(u, places[up.name][1] + 0.31), xytext=(x, places[down.name][1] + 0.31),
            arrowprops={"arrowstyle": "->", "color": "tab:blue", "alpha": 0.6,
                        "connectionstyle": f"arc3,rad=-{0.12 + 0.05 * (len(downs) - i)}"},
        )  # fmt: skip
    axes.text(-0.4, 0.75, f"x_t: {' × '.join(map(str, shape))}", fontsize=9)
    axes.set_xlim(-0.6, len(blocks) - 0.4)
    axes.set_ylim(-len(sides) + 0.4, 0.7 + 0.17 * len(downs))
    axes.set_axis_off()
    figure.savefig(file)
    total = sum(p.numel() for p in job.pipeline.unet.parameters())
    with_attention = [b.shape[1] for b in blocks if "Attn" in b.kind]
    return Drawn({
        "parameters": f"{total:,}", "levels": len(downs), "lowest": sides[-1],
        "attention": " and ".join(f"{s} × {s}" for s in sorted(set(with_attention))) or "no resolution but the middle",
    })  # fmt: skip


FIGURE = PaperFigure(
    name="network",
    title="The U-Net, read off the network",
    place="Appendix B",
    text="Each box is a block of the network with the shape (channels × height × width) that it gave out in one "
    "call, and its parameters: {parameters} in all. "
    "On {levels} levels the image is halved down to {lowest} × {lowest} and brought back; blue arrows are the "
    "skip connections that carry detail around the middle. "
    "Blocks in orange end at {attention} and attend to all places at once; every residual block is told t.",
    functions=("diffusers.UNet2DModel", "ddpm_hf.training.network.build_unet"),
    draw=_draw,
)
