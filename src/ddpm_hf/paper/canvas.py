"""Drawing: rows of images with words at their sides, and axes of one look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

DPI = 130


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure, of no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def as_rgb(pixels: Tensor) -> np.ndarray:
    """uint8 (…, C, H, W) → (…, H, W, 3); grayscale is repeated, and an alpha channel dropped."""
    array = pixels.movedim(-3, -1).cpu().numpy()
    return np.repeat(array, 3, -1) if array.shape[-1] == 1 else array[..., :3]


def draw_rows(
    rows: Sequence[Tensor], file: Path, *, left: Sequence[str] = (), top: Sequence[str] = (), title: str = ""
) -> None:
    """Rows of images, (n, C, H, W) uint8 each, one word at the left of each row and one above each column."""
    columns = max(len(row) for row in rows)
    cell = min(0.95, 12 / columns)
    margin = 0.12 * max((len(word) for word in left), default=0)
    figure = new_figure(
        cell * columns + margin, (cell + 0.06) * len(rows) + (0.3 if top else 0.05) + 0.35 * bool(title)
    )
    axes = np.atleast_2d(figure.subplots(len(rows), columns, squeeze=False))
    for r, row in enumerate(rows):
        shown = as_rgb(row)
        for c in range(columns):
            axis = axes[r, c]
            axis.set_xticks([])
            axis.set_yticks([])
            for side in axis.spines.values():
                side.set_visible(False)
            if c < len(shown):
                axis.imshow(shown[c], interpolation="nearest", vmin=0, vmax=255)
            if r == 0 and c < len(top):
                axis.set_title(top[c], fontsize=9)
        if r < len(left):
            axes[r, 0].set_ylabel(left[r], rotation=0, ha="right", va="center", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    figure.savefig(file)


def style(axes: Any, x: str, y: str, title: str = "") -> None:
    """Labels and a light grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
