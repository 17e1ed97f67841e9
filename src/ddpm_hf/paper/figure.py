"""What a figure is: its title, its explanation, the functions that compute it, its cost, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .job import Job


@dataclass(frozen=True)
class Drawn:
    """What drawing a figure leaves beside its picture.

    Args:
        numbers: fill the places of `PaperFigure.text`.
        table: rows of cells, of which the first is the head; shown below the picture.
    """

    numbers: dict[str, float | int | str] = field(default_factory=dict)
    table: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class PaperFigure:
    """One figure of the report.

    Args:
        name: of its file, and for `--figures`.
        title: its heading.
        place: where the paper has it.
        text: three sentences, with places for `Drawn.numbers` as in `str.format`.
        functions: that compute it, by their full names.
        draw: writes the picture into a PNG file, from the model, the images and the options of a job.
        options: the options that it depends on, beside the model, the images and the seed.
        needs_images: whether it needs real images.
        calls: how many images are sent through the network, counting each call, apart from the shared samples.
        uses_samples: whether it shows the samples that several figures share.
        has_picture: False for a table alone.
        is_optional: drawn only if it is named.
    """

    name: str
    title: str
    place: str
    text: str
    functions: tuple[str, ...]
    draw: Callable[[Job, Path], Drawn]
    options: tuple[str, ...] = ()
    needs_images: bool = False
    calls: Callable[[Job], int] = lambda job: 0
    uses_samples: bool = False
    has_picture: bool = True
    is_optional: bool = False
