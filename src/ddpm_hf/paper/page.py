"""The page of a report: one HTML file that holds its pictures and needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2330; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 0; }
section { border-top: 1px solid #ccd; padding: 1.2rem 0; } .place { color: #667; font-size: .9rem; margin: 0; }
img { max-width: 100%; display: block; margin: .8rem auto; } code { background: #eef1f6; padding: .1em .3em;
border-radius: 3px; font-size: .88em; overflow-wrap: anywhere; } table { border-collapse: collapse; margin: .8rem 0; }
td, th { border-bottom: 1px solid #ccd; padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
nav { columns: 2; font-size: .92rem; } nav a { display: block; color: #2a4d9b; } .note { color: #667; }
"""


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
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    absent = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in missing.items())
    left_out = f'<section class="note"><h2>Left out</h2><ul>{absent}</ul></section>' if absent else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(title)}</title><style>{STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n<table>{rows}</table>\n<nav>{links}</nav>\n"
        + "\n".join(map(_section, figures))
        + f"\n{left_out}</body></html>\n"
    )


def _section(figure: Mapping[str, Any]) -> str:
    functions = ", ".join(f"<code>{escape(name)}</code>" for name in figure["functions"])
    file: Path | None = figure["file"]
    picture = ""
    if file is not None:
        data = base64.b64encode(file.read_bytes()).decode()
        picture = f'<img alt="{escape(figure["title"])}" src="data:image/png;base64,{data}">'
    head = f'<h2>{escape(figure["title"])}</h2><p class="place">{escape(figure["place"])}</p>'
    return (
        f'<section id="{figure["name"]}">{head}'
        f'{picture}{_table(figure["table"])}<p>{_words(figure["text"])}</p><p class="note">Computed by {functions}.</p>'
        "</section>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _words(text: str) -> str:
    """Escaped, with `names` in the type of code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
