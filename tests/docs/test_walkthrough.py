"""The walkthrough: both languages from one source, every page complete, every equation asserted, and all of it run."""

import json
import re
import sys

import markdown
import pytest

from ddpm_hf import DDPMProcess
from support.reader import ROOT

sys.path.insert(0, str(ROOT / "docs"))
import build_walkthrough as walkthrough

pages = pytest.mark.parametrize("page", walkthrough.PAGES)


def words(page, language):
    return "\n\n".join(
        walkthrough.in_language(c.source, language) for c in walkthrough.read(page) if c.cell_type == "markdown"
    )


def asserted(page):
    """What the comments of a page's asserts name: equations, algorithms, sections."""
    code = "\n".join(c.source for c in walkthrough.read(page) if c.cell_type == "code")
    comments = re.findall(r"assert .*  # (.*)", code) + re.findall(r": *# (Algorithm \d|Appendix .)", code)
    return {name.strip() for comment in comments for name in comment.split(",")}, code


@pages
def test_a_page_says_the_same_in_both_languages_and_is_complete(page):
    for cell in walkthrough.read(page):
        if cell.cell_type == "markdown":
            assert all(len(walkthrough.in_language(cell.source, language)) > 10 for language in walkthrough.LANGUAGES)
    english, japanese = (words(page, language) for language in walkthrough.LANGUAGES)
    equations = [re.findall(r"\$\$(.+?)\$\$", text) for text in (english, japanese)]
    assert equations[0] == equations[1]
    assert [re.findall(r"\]\[([\w.]+)\]", text) for text in (english,)] == [re.findall(r"\]\[([\w.]+)\]", japanese)]
    assert not re.search(r"\\[{}|!_*]", english + japanese)  # an escape of Markdown, inside a formula
    assert re.search("[ぁ-ん]", japanese)
    assert not re.search("[ぁ-んァ-ン一-龥]", english)
    tags = [tag for cell in walkthrough.read(page) for tag in cell.metadata.get("tags", [])]
    assert "exercise" in tags
    assert any(c.cell_type == "code" and "solution" in c.metadata.get("tags", []) for c in walkthrough.read(page))


def test_the_table_lists_every_equation_with_a_page_that_asserts_it():
    text = (ROOT / "docs" / "pages" / "paper-to-code.md").read_text("utf-8")
    rows = re.findall(
        r"^\| ([^|]+) \| \[[^]]+\]\(walkthrough/(\w+)\.md\) \| `(\w+)` \| ([^|]+) \|$", text, re.MULTILINE
    )
    assert [row[0] for row in rows][:26] == [f"Eq. {n}" for n in range(1, 27)]
    assert {"Algorithm 1", "Algorithm 2", "Section 3.2", "Section 4", "Appendix B"} <= {row[0] for row in rows}
    for equation, page, function, _ in rows:
        found, code = asserted(page)
        assert equation in found, (equation, page)
        assert re.search(rf"\b{function}\(", code), (function, page)


@pytest.mark.parametrize(
    ("function", "part", "page"),
    [
        *(("posterior_coefficients", part, "posterior") for part in range(3)),
        *(("q_mean_variance", part, "closed_form") for part in range(2)),
        *(("q_step_mean_variance", part, "loss") for part in range(2)),
        *(("x_0_coefficients", part, "loss") for part in range(2)),
        ("p_log_variance", None, "loss"), ("L_t_minus_1", None, "loss"),
    ],
)  # fmt: skip
def test_a_coefficient_that_is_wrong_by_two_percent_fails_its_page(function, part, page, monkeypatch):
    right = getattr(DDPMProcess, function)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        if part is None:
            return 1.02 * result
        parts = [1.02 * value if i == part else value for i, value in enumerate(result)]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)

    monkeypatch.setattr(DDPMProcess, function, wrong)
    with pytest.raises(AssertionError):
        walkthrough.run_page(page)


@pytest.mark.parametrize("page", ["loss", "sampling"])
def test_a_notebook_needs_no_other_page(page):
    """It installs the package where there is none, and trains the model where it uses one."""
    cells = [cell["source"] for cell in json.loads(walkthrough.to_notebook(page, "ja"))["cells"]]
    cells = ["".join(source) for source in cells]
    assert 'find_spec("ddpm_hf") is None' in cells[0]
    assert ("train(TrainConfig(" in cells[1]) == (page == "sampling")


def test_equations_are_spaced_as_in_tex():
    text = markdown.markdown(r"$-\log p(x) \sim \sum_{t > 1} \cos t$", extensions=["l2m4m:LaTeX2MathMLExtension"])
    html = walkthrough.on_page_content(text)
    assert re.sub(r"<[^>]*space[^>]*>", " ", html).count("log</mi> <mi>") == 1
    assert "<munder><mo>&#x02211;</mo>" in html
    assert "<mo>&#x0223C;</mo>" in html


@pytest.mark.slow
def test_every_page_runs_and_becomes_two_pages_and_two_notebooks():
    """The outputs are kept, so that the build of the site, which comes next in CI, does not run the pages again."""
    outputs = walkthrough.run_all()
    assert list(outputs) == list(walkthrough.PAGES)
    for page, found in outputs.items():
        assert any(output.pictures for output in found), page
        english, japanese = (walkthrough.to_markdown(page, found, language) for language in walkthrough.LANGUAGES)
        blocks = [re.findall(r"```.*?```", text.replace("Output", "出力"), re.DOTALL) for text in (english, japanese)]
        assert blocks[0] == blocks[1]  # code and outputs
        assert english.count('??? success "Solution"') == japanese.count('??? success "解答"') == 1
        for language in walkthrough.LANGUAGES:
            assert "](M." not in walkthrough.to_notebook(page, language)
