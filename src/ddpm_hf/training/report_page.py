"""The page of a run, `report.html`: written for a reader who knows nothing of diffusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from ..page import document, facts_table, picture, words
from .charts import STYLE as CHARTS
from .charts import Line, line_chart
from .trouble import Trouble

RELOAD_AFTER = 30  # seconds
EARLY = 0.3  # of the training
METRICS = {"bits_per_dim": "bits per dimension", "frechet": "Fréchet distance"}
STYLE = (
    CHARTS
    + """
h3 { font-size: 1rem; margin: 1rem 0 0; } th { padding-right: 1rem; }
progress { width: 100%; height: 1rem; } .state { font-size: 1.1rem; margin: .6rem 0; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair figure { flex: 1 1 18rem; margin: 0; }
figure { margin: .6rem 0; } figure img { margin: .2rem 0; }
.row img { width: 100%; max-width: 40rem; margin: .2rem 0; }
.grid img { width: 100%; max-width: 24rem; } section > h2 { margin-bottom: .6rem; }
figcaption { color: var(--soft); font-size: .9rem; }
.trouble { border-left: 4px solid #d9822b; padding: .1rem 0 .1rem .8rem; margin: .8rem 0; }
.trouble p { margin: .2rem 0; }
"""
)


@dataclass
class Contents:
    """What the page shows; pictures are PNGs.

    Args:
        title: of the run.
        state: what the run is doing, in a sentence or two.
        is_running: whether there is more to come.
        progress: the share of the updates that are done.
        explanation: paragraphs on what is trained, on what.
        facts: names and values.
        troubles: the update after which it was found, and the trouble.
        samples, real: grids.
        history: the update, and some of the samples after it.
        nearest: samples above their nearest training images.
        copies: how many samples copy a training image, in a sentence.
        entries: of the log.
        best: the update of the best checkpoint.
        metric: what selects it.
    """

    title: str
    state: str
    is_running: bool
    progress: float
    explanation: Sequence[str]
    facts: Sequence[tuple[str, str]]
    troubles: Sequence[tuple[int, Trouble]] = ()
    samples: bytes | None = None
    real: bytes | None = None
    history: Sequence[tuple[int, bytes]] = ()
    nearest: bytes | None = None
    copies: str = ""
    entries: Sequence[Mapping[str, Any]] = field(default_factory=list)
    best: int | None = None
    metric: str = ""


def render(contents: Contents) -> str:
    """The page."""
    done = f"{contents.progress:.0%}"
    head = (
        f"<h1>{escape(contents.title)}</h1>\n"
        f'<p class="state">{words(contents.state)}</p><progress max="1" value="{contents.progress:.4f}" '
        f'aria-label="updates done">{done}</progress>\n'
    )
    sections = [
        _troubles(contents), _samples(contents), _plan(contents), _history(contents), _nearest(contents),
        _held_out(contents), _loss(contents),
    ]  # fmt: skip
    reload_after = RELOAD_AFTER if contents.is_running else None
    return document(contents.title, head + "\n".join(sections), style=STYLE, reload_after=reload_after)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(png: bytes, alt: str, caption: str, kind: str = "grid") -> str:
    return f'<figure class="{kind}">{picture(png, alt)}<figcaption>{escape(caption)}</figcaption></figure>'


def _troubles(contents: Contents) -> str:
    if not contents.troubles:
        return ""
    parts = [
        f'<div class="trouble"><p><strong>{words(t.what)}</strong>: {words(t.evidence)}.</p><p>{words(t.remedy)}</p>'
        f'<p class="place">Found {f"after update {step:,}" if step else "before the first update"}.</p></div>'
        for step, t in contents.troubles
    ]
    return _section("Warnings", "".join(parts))


def _samples(contents: Contents) -> str:
    if contents.real is None:
        return ""
    real = _figure(contents.real, "Real images of the training set", "Real images, for comparison")
    if contents.samples is None:
        return _section("Samples", f'<p class="note">The first samples are still to come.</p>{real}')
    caption = "Drawn by the network"
    if contents.is_running:
        caption += f" after {contents.progress:.0%} of the training"
        caption += ": noise and blots are normal so early" if contents.progress < EARLY else ""
    drawn = _figure(contents.samples, "Samples of the network", caption)
    return _section("Samples", f'<div class="pair">{drawn}{real}</div>')


def _plan(contents: Contents) -> str:
    text = "".join(f"<p>{words(paragraph)}</p>" for paragraph in contents.explanation)
    return _section("What is being trained", text + facts_table(contents.facts))


def _history(contents: Contents) -> str:
    if not contents.history:
        return ""
    rows = "".join(
        _figure(png, f"Samples after update {step:,}", f"after update {step:,}", "row")
        for step, png in contents.history
    )
    text = "Each column starts from the same noise every time, so that only what was learned differs."
    return _section("The same samples over time", f"<p>{text}</p>{rows}")


def _nearest(contents: Contents) -> str:
    if contents.nearest is None:
        return f"<section><h2>Copies</h2><p>{words(contents.copies)}</p></section>" if contents.copies else ""
    text = (
        "Does the network draw new images, or does it copy? Above are samples, those most like a training image first; "
        "below is the training image that each is nearest to."
    )
    pairs = _figure(contents.nearest, "Samples above their nearest training images", contents.copies, "row")
    return _section("Nearest training images", f"<p>{text}</p>{pairs}")


def _loss(contents: Contents) -> str:
    losses = [(e["step"], e["loss"]) for e in contents.entries if "loss" in e]
    rates = [(e["step"], e["lr"]) for e in contents.entries if "lr" in e]
    text = (
        "The loss says how wrong the network is about the noise in the training images. It falls fast at first and "
        "hardly later, while the samples still improve: judge by them."
    )
    charts = line_chart("Loss", [Line("", losses)], log=True) + line_chart(
        "Learning rate: how far each update corrects the network", [Line("", rates)]
    )
    return _section("Loss and learning rate", f'<p>{text}</p><div class="charts">{charts}</div>') if charts else ""


def _held_out(contents: Contents) -> str:
    measured = [e for e in contents.entries if any(name.startswith("eval_") for name in e)]
    if not measured:
        return ""

    def line(name: str, label: str = "") -> Line:
        return Line(label, [(e["step"], e[f"eval_{name}"]) for e in measured if f"eval_{name}" in e])

    best = ""
    if contents.best is not None:
        best = f" The green line marks the best checkpoint, by {METRICS[contents.metric]}: update {contents.best:,}."
    text = (
        "Measured on images that the network never trains on: lower is better. Where these curves turn upwards while "
        "the loss still falls, it begins to memorize its training images."
    )
    charts = (
        line_chart("Bits per dimension of held-out images", [line("bits_per_dim")], mark=contents.best)
        + line_chart(
            "Fréchet distance to held-out images",
            [line("frechet", "blue: samples"), line("frechet_of_training_images", "grey: the training images")],
            log=True,
            mark=contents.best,
        )
        + line_chart("Share of samples that copy a training image", [line("copies")])
    )
    return _section("Held-out images", f'<p>{text}{best}</p><div class="charts">{charts}</div>')
