"""A hook of mkdocs: runs `walkthrough/*.py` and makes of each a page in English, one in Japanese, and two notebooks.

The sources are in jupytext's percent format. A cell of words holds both languages, after the marks `<!-- en -->` and
`<!-- ja -->`; code is the same for both, so that its outputs are, too. Cells tagged `exercise` and `solution` become a
question, and an answer that is folded away. The outputs are those of the run that builds the site, kept in
`walkthrough/.cache` until a source or the package changes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jupytext
import nbformat

SOURCES = Path(__file__).parent / "walkthrough"
CACHE = SOURCES / ".cache" / "outputs.json"
# In reading order: later pages use the model that `training` leaves.
PAGES = (
    "forward", "closed_form", "posterior", "loss", "network", "training", "sampling", "likelihood", "few_steps",
    "guidance", "sharing", "unified",
)  # fmt: skip
LANGUAGES = ("en", "ja")
WORDS = {
    "en": {"exercise": "Exercise", "solution": "Solution", "output": "Output", "next": "Next",
           "notebook": "this page as a notebook", "other": "日本語"},
    "ja": {"exercise": "練習問題", "solution": "解答", "output": "出力", "next": "次へ",
           "notebook": "このページのノートブック", "other": "English"},
}  # fmt: skip
ALIASES = {
    "P.": "ddpm_hf.diffusion.ddpm_process.DDPMProcess.",
    "M.": "ddpm_hf.diffusion.ddpm_process.",
}
KANA = "ぁ-んァ-ヶー一-龥、。「」（）"
INSTALL = '''import importlib.util

if importlib.util.find_spec("ddpm_hf") is None:
    %pip install -q "ddpm-hf[train]"'''
# In reading order; a notebook of a later page trains the model itself where it finds none.
MODEL = "walkthrough-digits"
TRAIN = "from pathlib import Path\n\nfrom ddpm_hf import TrainConfig, train\n\n"


@dataclass
class Output:
    """What a code cell left: its text, and its pictures as PNG."""

    text: str = ""
    pictures: list[bytes] = field(default_factory=list)


def read(page: str) -> list[Any]:
    """The cells of a page: `cell_type`, `source`, and `metadata.tags`."""
    return jupytext.read(SOURCES / f"{page}.py", fmt="py:percent").cells


def in_language(source: str, language: str) -> str:
    """One language's part of a cell of words; all of a cell that has no marks."""
    parts = re.split(r"<!-- (en|ja) -->\n?", source)
    if len(parts) == 1:
        return source
    text = dict(zip(parts[1::2], parts[2::2], strict=True))[language].strip()
    return join_lines(text) if language == "ja" else text


def code_of(cell: Any) -> str:
    """The code of a cell, without marks for the formatter."""
    return cell.source.replace("  # fmt: skip", "")


def join_lines(text: str) -> str:
    """Japanese text without the spaces that a browser puts in the place of line breaks."""
    text = re.sub(r"(?<=[、。（「])\n(?=\S)", "", text)
    text = re.sub(rf"(?<=[{KANA}])\n(?=[{KANA}*\[])", "", text)
    return re.sub(rf"(?<=[*)])\n(?=[{KANA}])", "", text)


# --- running ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _default_dtype_kept() -> Iterator[None]:
    """A page may choose another; what runs after it in this process must not meet it."""
    import torch

    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@_default_dtype_kept()
def run_page(page: str, namespace: dict[str, Any] | None = None) -> list[Output]:
    """Run the code of a page, in the current folder.

    Raises:
        Exception: what the code raises, with a note of the page and the cell.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    namespace = {"__name__": "__main__"} if namespace is None else namespace
    outputs = []
    for number, cell in enumerate(c for c in read(page) if c.cell_type == "code"):
        text = io.StringIO()
        try:
            with contextlib.redirect_stdout(text), warnings.catch_warnings(action="ignore"):
                exec(compile(cell.source, f"{page}.py, code cell {number + 1}", "exec"), namespace)
        except Exception as error:
            error.add_note(f"in walkthrough/{page}.py, code cell {number + 1}:\n{cell.source}")
            raise
        pictures = []
        for figure in map(pyplot.figure, pyplot.get_fignums()):
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
            pictures.append(file.getvalue())
        pyplot.close("all")
        outputs.append(Output(text.getvalue().strip("\n"), pictures))
    return outputs


def run_all() -> dict[str, list[Output]]:
    """The outputs of all pages: of a run now, or of an earlier one of the same sources and package."""
    key = _key()
    if CACHE.is_file():
        stored = json.loads(CACHE.read_text("utf-8"))
        if stored["key"] == key:
            return {
                page: [Output(o["text"], [base64.b64decode(p) for p in o["pictures"]]) for o in outputs]
                for page, outputs in stored["pages"].items()
            }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found = {page: run_page(page) for page in PAGES}
    pages = {
        page: [{"text": o.text, "pictures": [base64.b64encode(p).decode() for p in o.pictures]} for o in outputs]
        for page, outputs in found.items()
    }
    CACHE.parent.mkdir(exist_ok=True)
    partial = CACHE.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"key": key, "pages": pages}), "utf-8")
    partial.replace(CACHE)
    return found


def _key() -> str:
    import torch

    import ddpm_hf

    digest = hashlib.sha256(torch.__version__.encode())
    package = Path(ddpm_hf.__file__).parent
    for file in [*sorted(package.rglob("*.py")), *(SOURCES / f"{page}.py" for page in PAGES)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


# --- writing ----------------------------------------------------------------------------------------------------------


def to_markdown(page: str, outputs: list[Output], language: str) -> str:
    """The page in one language; pictures lie beside the English one as `PAGE-1.png`, …"""
    words, up = WORDS[language], "" if language == "en" else "../"
    other = f"ja/{page}.md" if language == "en" else f"../{page}.md"
    remaining, picture, blocks = iter(outputs), 0, []
    for cell in read(page):
        tags, indent = cell.metadata.get("tags", []), ""
        if cell.cell_type == "markdown":
            text = in_language(cell.source, language)
        else:
            output = next(remaining)
            text = f"```python\n{code_of(cell)}\n```"
            if output.text:
                text += f'\n\n```text title="{words["output"]}"\n{output.text}\n```'
            for _ in output.pictures:
                picture += 1
                text += f"\n\n![{page} {picture}]({up}{page}-{picture}.png)"
        if "exercise" in tags:
            blocks.append(f'!!! question "{words["exercise"]}"\n')
            indent = "    "
        elif "solution" in tags:
            if not blocks or not blocks[-1].startswith(("??? ", "    <!-- solution -->")):
                blocks.append(f'??? success "{words["solution"]}"\n')
            indent = "    "
        blocks.append("\n".join(indent + line if line else "" for line in text.splitlines()))
        if "solution" in tags:
            blocks.append("    <!-- solution -->")
    head, *rest = blocks
    links = f"[{words['other']}]({other}) · [{words['notebook']}]({page}.ipynb){{ download }}"
    after = PAGES[PAGES.index(page) + 1 :]
    if after:
        title = in_language(read(after[0])[0].source, language).splitlines()[0].lstrip("# ")
        rest.append(f"**{words['next']}:** [{title}]({after[0]}.md)")
    title, _, lead = head.partition("\n")
    text = "\n\n".join([title, links, lead.strip(), *rest])
    for short, full in ALIASES.items():
        text = text.replace(f"][{short}", f"][{full}")
    return text + "\n"


def to_notebook(page: str, language: str) -> str:
    """The page as a notebook in one language, without outputs; solutions are folded."""
    notebook = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    notebook.cells.append(nbformat.v4.new_code_cell(INSTALL, id="install"))
    if page != "training" and any(MODEL in cell.source for cell in read(page)):
        training = next(code_of(cell) for cell in read("training") if cell.source.startswith("MODEL ="))
        notebook.cells.append(nbformat.v4.new_code_cell(TRAIN + training, id="train"))
    for number, cell in enumerate(read(page)):
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "code":
            new = nbformat.v4.new_code_cell(code_of(cell), id=f"cell-{number}")
        else:
            text = re.sub(r"\[(`[^`]+`)\]\[[^\]]+\]", r"\1", in_language(cell.source, language))
            text = re.sub(r"\]\((\w+)\.md\)", r"](\1.ipynb)", text)
            heading = next((f"**{WORDS[language][t]}.** " for t in ("exercise", "solution") if t in tags), "")
            new = nbformat.v4.new_markdown_cell(heading + text, id=f"cell-{number}")
        if "solution" in tags:
            new.metadata["jupyter"] = {"source_hidden": True}
        notebook.cells.append(new)
    nbformat.validate(notebook)
    return nbformat.writes(notebook)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Join the lines of the Japanese pages that are written by hand."""
    return join_lines(markdown) if "/ja/" in page.file.src_uri else markdown


def on_page_content(html: str, **_: Any) -> str:
    """Set equations as TeX does: room around log and ~, limits under sums, a sign close to its number."""
    html = html.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>").replace("<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>")
    thin, name = '<mspace width="0.167em"/>', "<mi>(?:log|cos|sin)</mi>"
    html = re.sub(rf"({name})(?!<mo)", rf"\1{thin}", html)
    html = re.sub(rf"(</m(?!o>)\w+>)(?={name})", rf"\1{thin}", html)
    html = re.sub(r"<msub>(<mo>&#x02211;</mo>(?:(?!<msub>).)*?)</msub>", r"<munder>\1</munder>", html)
    opening = r"<mo[^>]*>(?:\[|&#x00028;|&#x0003D;)</mo>"
    return re.sub(rf"({opening})<mo>(?=&#x02212;)", r'\1<mo form="prefix">', html)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, their pictures and the notebooks to the site."""
    from mkdocs.structure.files import File

    for page, outputs in run_all().items():
        pictures = [p for output in outputs for p in output.pictures]
        for number, picture in enumerate(pictures, 1):
            files.append(File.generated(config, f"walkthrough/{page}-{number}.png", content=picture))
        for language in LANGUAGES:
            place = "walkthrough" if language == "en" else f"walkthrough/{language}"
            files.append(File.generated(config, f"{place}/{page}.md", content=to_markdown(page, outputs, language)))
            files.append(File.generated(config, f"{place}/{page}.ipynb", content=to_notebook(page, language)))
    return files
