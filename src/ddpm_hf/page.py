"""Pages in HTML that hold all they need: one file, no scripts, light or dark as the reader's system is."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --ground: #fff; --line: #ccd; --soft: #5b6272; --code: #eef1f6;
--link: #2a4d9b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ee; --ground: #15181f; --line: #3a4150; --soft: #a3abbd;
--code: #262c38; --link: #9bb8ff; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
background: var(--ground); overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin: 0; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; }
.place { color: var(--soft); font-size: .9rem; margin: 0; } .note { color: var(--soft); }
img { max-width: 100%; display: block; margin: .8rem auto; } code { background: var(--code); padding: .1em .3em;
border-radius: 3px; font-size: .88em; overflow-wrap: anywhere; } table { border-collapse: collapse; margin: .8rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
nav { columns: 2; font-size: .92rem; } nav a { display: block; color: var(--link); }
"""


def document(title: str, body: str, *, style: str = "", reload_after: int | None = None) -> str:
    """A page.

    Args:
        title: in plain text; the body has its own heading.
        body: HTML.
        style: CSS beside `STYLE`.
        reload_after: seconds after which a browser loads the page again.
    """
    reload = f'<meta http-equiv="refresh" content="{reload_after}">' if reload_after else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1">{reload}<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def picture(png: bytes, alt: str) -> str:
    """A PNG within the page."""
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, whose first row is its head; nothing for no rows."""
    if not rows:
        return ""
    head, *body = rows
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def facts_table(facts: Sequence[tuple[str, str]]) -> str:
    """A table of names and values, in plain text."""
    rows = "".join(f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in facts)
    return f"<table>{rows}</table>"


def words(text: str) -> str:
    """Plain text, with `names` in the type of code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
