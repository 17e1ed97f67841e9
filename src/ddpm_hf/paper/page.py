"""The page of a report: one HTML file that holds its pictures and needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..page import document, facts_table, picture, table, words


def render(
    title: str, facts: Mapping[str, str], figures: Sequence[Mapping[str, Any]], missing: Mapping[str, str]
) -> str:
    """The page.

    Args:
        title: its heading.
        facts: what the report was made from.
        figures: `name`, `title`, `place`, `text`, `functions`, `table`, and `file`, the path of the picture or None.
        missing: figures that were left out, and why.
    """
    links = "".join(f'<a href="#{f["name"]}">{escape(f["title"])}</a>' for f in figures)
    absent = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in missing.items())
    left_out = f'<section class="note"><h2>Left out</h2><ul>{absent}</ul></section>' if absent else ""
    head = f"<h1>{escape(title)}</h1>\n{facts_table(list(facts.items()))}\n<nav>{links}</nav>\n"
    return document(title, head + "\n".join(map(_section, figures)) + f"\n{left_out}")


def _section(figure: Mapping[str, Any]) -> str:
    functions = ", ".join(f"<code>{escape(name)}</code>" for name in figure["functions"])
    file: Path | None = figure["file"]
    drawn = picture(file.read_bytes(), figure["title"]) if file is not None else ""
    head = f'<h2>{escape(figure["title"])}</h2><p class="place">{escape(figure["place"])}</p>'
    return (
        f'<section id="{figure["name"]}">{head}'
        f'{drawn}{table(figure["table"])}<p>{words(figure["text"])}</p><p class="note">Computed by {functions}.</p>'
        "</section>"
    )
