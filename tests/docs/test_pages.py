"""The code blocks of the pages run, in their order, as a reader runs them: tiny models, a folder of their own."""

import re
import shutil
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import ddpm_hf
from support.hub_server import point_client_at, serve_hub
from support.reader import ROOT, furnish, run_shell, write_yaml

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "pages").glob("*.md"))]
SLOW = {"train"}
MAY_BE_SKIPPED = 15  # blocks, of all pages together


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    furnish(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hub at which the reader is logged in as `me`."""
    with serve_hub() as server:
        point_client_at(server, monkeypatch, tmp_path_factory.mktemp("hub"))
        monkeypatch.setenv("HF_TOKEN", server.add_token("hf_ReaderOfTheDocumentation", "me"))
        yield server


def parse(page: Path) -> Document:
    bash = CodeBlockParser("bash", lambda example: run_shell(example.parsed))
    yaml = CodeBlockParser("yaml", lambda example: write_yaml(example.parsed))
    return Document.parse(str(page), PythonCodeBlockParser(), bash, yaml, SkipParser())


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in PAGES]
)
def test_code_of_the_page_runs(page, reader_folder, hub, tmp_path, monkeypatch):
    shutil.copytree(reader_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for example in parse(page):
        print(f"--- {page.name}, line {example.line}")
        try:
            example.evaluate()
        except SkipTest as reason:
            print(f"not run: {reason}")


def test_blocks_that_are_not_run_are_few_and_say_why():
    skipped = [s for page in PAGES for s in re.findall(r"<!--- skip: (.*?) -->", page.read_text("utf-8"))]
    assert len(skipped) <= MAY_BE_SKIPPED
    assert all(re.fullmatch(r'next "[^"]+"', directive) for directive in skipped), skipped


def test_every_public_name_is_on_the_page_of_the_public_names():
    names = re.findall(r"\[`(\w+)`\]", (ROOT / "docs" / "pages" / "api" / "index.md").read_text("utf-8"))
    assert sorted(names) == [name for name in ddpm_hf.__all__ if not name.startswith("__")]


def test_messages_that_troubleshooting_quotes_are_those_of_the_code():
    quoted = re.findall(
        r'^\| "([^"…]+)', (ROOT / "docs" / "pages" / "troubleshooting.md").read_text("utf-8"), re.MULTILINE
    )
    code = "".join(file.read_text("utf-8") for file in (ROOT / "src").rglob("*.py"))
    assert quoted
    assert [message for message in quoted if message.strip() not in code] == []
