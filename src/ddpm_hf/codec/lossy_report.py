"""A page about a progressive file: its pictures at every rate, and its rates beside the bound and other formats."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.pictures import to_pil
from ..data.pixels import to_uint8
from ..diffusion.pipeline import DDPMPipelineCustom
from ..evaluation.likelihood import bits_per_dim, rate_distortion
from ..page import document, picture, table, words
from .formats import Rated, psnr_of, rate_at, rate_formats
from .lossy import Point, Sent
from .measuring import with_calibration

SHOWN = 8  # images
STAGES = 16  # of the slider, at most
STYLE = """
.stages input { position: absolute; opacity: 0; }
.stages label { display: inline-block; padding: .15rem .5rem; border: 1px solid var(--line); margin: 0 -1px .3rem 0;
font-size: .8rem; cursor: pointer; }
.stages input:checked + label { background: var(--link); color: var(--ground); }
.stages input:focus-visible + label { outline: 2px solid var(--ink); }
.stages .view { display: none; } .stages img { image-rendering: pixelated; width: 100%; margin: .3rem 0; }
"""


@dataclass
class Pictures:
    """Collects the receiver's pictures while images are compressed: pass it as `shown`."""

    stages: list[NDArray[np.uint8]] = field(default_factory=list)

    def __call__(self, steps: int, x_0: Tensor) -> None:
        """Keep the first images, (C, H, W) each, after so many steps."""
        self.stages.append(to_uint8(x_0[:SHOWN]).numpy())


def bound_points(
    pipeline: DDPMPipelineCustom, pixels: NDArray[np.uint8], num_inference_steps: int, batch_size: int,
    class_label: int | None = None, show_progress: bool = False,
) -> list[tuple[float, float]]:  # fmt: skip
    """Rate (bits per pixel) and PSNR of an ideal code of the same chain: see `ddpm_hf.rate_distortion`."""
    bits = bits_per_dim(
        with_calibration(pipeline, pixels, class_label), torch.from_numpy(pixels), timesteps="optimal",
        num_inference_steps=num_inference_steps, variance_type="optimal", batch_size=batch_size,
        class_labels=class_label, title="The bound", show_progress=show_progress,
    )  # fmt: skip
    curve = rate_distortion(bits)
    rates, errors = curve.rate * pixels.shape[1], curve.distortion.square()
    return [(rate, psnr_of(error)) for rate, error in zip(rates.tolist(), errors.tolist(), strict=True)]


def report_page(
    sent: Sent, pictures: Pictures, pixels: NDArray[np.uint8], bound: Sequence[tuple[float, float]], name: str
) -> str:
    """The page, in HTML.

    Args:
        sent: what the compression came to.
        pictures: of its stages.
        pixels: the images, uint8 (N, C, H, W).
        bound: of `bound_points`.
        name: of the file.
    """
    formats = rate_formats(pixels)
    ours = [(point.bits / sent.pixels, point.psnr) for point in sent.points]
    sections = [
        f"<h1>{words(f'`{name}`')}</h1><p>{len(pixels)} images: {'<br>'.join(map(words, sent.lines()))}</p>",
        "<section><h2>What a prefix of the file shows</h2>"
        "<p>Choose a rate; the arrow keys move on. The upper row has the images themselves.</p>"
        f"{_slider(sent, pictures, pixels)}</section>",
        "<section><h2>Rate and distortion</h2>"
        f"{picture(_plot(ours, bound, formats), 'PSNR against bits per pixel')}"
        "<p>The bound is what an ideal code of this chain would need, on average: the terms of Eq. 5 of the paper "
        "up to each timestep, against the error of x̂_0 there. Rates of other formats are those of files, one an "
        "image; of these without their headers; and of one file with all images side by side. The rate of this file "
        "is that of its bits; header and checksums come on top.</p>"
        f"{table(_comparison(sent, ours, bound, formats))}</section>",
        f"<section><h2>By timestep</h2>{table(_steps(sent.points, ours, bound))}</section>",
    ]
    return document(f"Progressive compression: {name}", "\n".join(sections), style=STYLE)


def _slider(sent: Sent, pictures: Pictures, pixels: NDArray[np.uint8]) -> str:
    """Stages evenly spread over the bits, as radio buttons: no script is needed."""
    bits = np.array([point.bits for point in sent.points])
    wanted = np.linspace(0, bits[-1], STAGES)
    stages = sorted({int(np.abs(bits - rate).argmin()) for rate in wanted})
    buttons, views, rules = [], [], []
    for i in stages:
        point, checked = sent.points[i], " checked" if i == stages[-1] else ""
        rows = np.concatenate([pixels[:SHOWN], pictures.stages[i]])
        caption = f"{point.bits / sent.pixels:.3f} bits/pixel, {point.psnr:.1f} dB, t = {point.t}"
        rate = f"{point.bits / sent.pixels:.2f}"
        buttons.append(f'<input type="radio" name="stage" id="s{i}"{checked}><label for="s{i}">{rate}</label>')
        views.append(f'<div class="view" id="v{i}"><p>{caption}</p>{picture(_rows(rows), caption)}</div>')
        rules.append(f"#s{i}:checked ~ #v{i} {{ display: block; }}")
    return f"<style>{' '.join(rules)}</style><div class='stages'>{''.join(buttons)}{''.join(views)}</div>"


def _rows(pixels: NDArray[np.uint8]) -> bytes:
    """Two rows of images, (2 n, C, H, W), as a PNG of their own size."""
    frame = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=128)
    half = len(frame) // 2
    sheet = np.concatenate(
        [np.concatenate(list(frame[:half]), axis=2), np.concatenate(list(frame[half:]), axis=2)], axis=1
    )
    stream = io.BytesIO()
    to_pil(torch.from_numpy(sheet[None]))[0].save(stream, "PNG")
    return stream.getvalue()


def _plot(
    ours: Sequence[tuple[float, float]], bound: Sequence[tuple[float, float]], formats: dict[str, list[Rated]]
) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*bound, strict=True), color="black", linestyle=":", label="bound of this chain")
    axes.plot(*zip(*ours, strict=True), color="tab:blue", marker=".", label="this file")
    for color, (name, rated) in zip(("tab:red", "tab:green", "tab:orange"), formats.items(), strict=False):
        axes.plot([r.sheet for r in rated], [r.sheet_psnr for r in rated], color=color, label=f"{name}, one sheet")
        axes.plot([r.contents for r in rated], [r.psnr for r in rated], color=color, linestyle="--", linewidth=1,
                  label=f"{name}, no headers")  # fmt: skip
    axes.set_xlim(0, 3 * ours[-1][0] + 0.05)
    axes.set_ylim(min(q for _, q in ours) - 1, max(q for _, q in ours) + 3)
    axes.set_xlabel("bits per pixel")
    axes.set_ylabel("PSNR (dB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _comparison(
    sent: Sent, ours: Sequence[tuple[float, float]], bound: Sequence[tuple[float, float]],
    formats: dict[str, list[Rated]],
) -> list[list[str]]:  # fmt: skip
    highest = ours[-1][1]
    psnrs = [*range(4 * math.ceil(ours[0][1] / 4), math.floor(highest) + 1, 4), highest]
    around = 8 * (sent.header_bytes + sent.checksum_bytes) / sent.pixels
    rows = [["bits/pixel at a PSNR of", *(f"{p:.4g} dB" for p in psnrs)]]
    codes: list[tuple[str, Sequence[tuple[float, float]]]] = [
        ("bound of this chain", bound),
        ("this file's bits", ours),
        ("… with header and checksums", [(rate + around, quality) for rate, quality in ours]),
    ]
    for name, rated in formats.items():
        codes += [
            (f"{name}, a file each", [(r.files, r.psnr) for r in rated]),
            (f"{name}, without headers", [(r.contents, r.psnr) for r in rated]),
            (f"{name}, one sheet", [(r.sheet, r.sheet_psnr) for r in rated]),
        ]
    for label, points in codes:
        rates = [rate_at(p, points) for p in psnrs]
        rows.append([label, *("" if rate is None else f"{rate:.3f}" for rate in rates)])
    return rows


def _steps(
    points: Sequence[Point], ours: Sequence[tuple[float, float]], bound: Sequence[tuple[float, float]]
) -> list[list[str]]:
    rows = [["t", "bits/pixel", "PSNR (dB)", "bound at this PSNR", "overhead"]]
    for point, (rate, quality) in zip(points, ours, strict=True):
        least = rate_at(quality, bound)
        over = "" if not least or not rate else f"{rate / least - 1:+.0%}"
        rows.append([str(point.t), f"{rate:.4f}", f"{quality:.2f}", "" if least is None else f"{least:.4f}", over])
    return rows
