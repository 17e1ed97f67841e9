"""The code blocks of the pages run, in their order, as a reader runs them: with a tiny model, in an empty folder."""

import re
import shutil
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import ddpm_hf
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from support.models import tiny_unet

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "pages").glob("*.md"))


@pytest.fixture(scope="module")
def reader_folder(tmp_path_factory):
    """What a reader has who followed the first page: a model."""
    folder = tmp_path_factory.mktemp("reader")
    DDPMPipelineCustom(tiny_unet(channels=1), DDPMSchedulerCustom()).save_pretrained(folder / "ddpm-digits")
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_of_the_page_runs(page, reader_folder, tmp_path, monkeypatch):
    shutil.copytree(reader_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for example in Document.parse(str(page), PythonCodeBlockParser(), SkipParser()):
        try:
            example.evaluate()
        except SkipTest as reason:
            print(f"{page.name}, line {example.line}: not run, {reason}")


def test_every_public_name_is_on_the_page_of_the_public_names():
    names = re.findall(r"\[`(\w+)`\]", (ROOT / "docs" / "pages" / "api" / "index.md").read_text("utf-8"))
    assert sorted(names) == [name for name in ddpm_hf.__all__ if not name.startswith("__")]
