"""A card written again: what a person has edited stays, the rest is brought up to date."""

import re
import shutil
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import EvalResult

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.sharing.card import CardFacts, write_card
from support.card_rules import card_errors
from support.cards import FACTS, FID, card_of, metadata
from support.runs import ROOT


def edit(folder, *replacements):
    text = card_of(folder)
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "README.md").write_text(text, "utf-8")


def test_writing_again_changes_nothing(make_model):
    folder = make_model()
    once = write_card(folder, FACTS).read_text("utf-8")
    assert write_card(folder, FACTS).read_text("utf-8") == once
    assert write_card(folder).read_text("utf-8") == once  # what was known is still known
    DDPMPipelineCustom.from_pretrained(folder).save_pretrained(folder)
    assert card_of(folder) == once


def test_what_a_person_has_edited_stays_and_the_rest_is_updated(make_model):
    folder = make_model()
    write_card(folder, FACTS)
    edit(
        folder,
        ("license: mit", "license: cc-by-4.0  # ours\nlanguage: en\nmy_key: 1"),
        ("- ddpm-hf\n", "- digits\n"),
        ("# digits\n", "# The digits of my project\n"),
        ("## Sampling steps\n", "Between the sections.\n\n## Steps\n\nUse 50.\n"),
        ("## Citation", "## Thanks\n\nTo all.\n\n## Citation"),
    )
    text = card_of(folder)
    start, end = text.index("<!-- ddpm-hf:limits -->"), text.index("<!-- /ddpm-hf:limits -->") + 24
    (folder / "README.md").write_text(text[:start] + text[end:] + "\nThe end.\n", "utf-8")  # a section removed
    (folder / "samples.png").write_bytes(b"png")
    for _ in range(2):
        card = write_card(folder, CardFacts(updates=9999, license="mit")).read_text("utf-8")
        data = metadata(card)
        assert (data["license"], data["language"], data["my_key"]) == ("cc-by-4.0", "en", 1)
        assert data["tags"] == ["ddpm", "digits"]
        for words in (
            "# The digits of my project",
            "Between the sections.\n\n## Steps\n\nUse 50.",
            "## Thanks",
            "The end.",
        ):
            assert words in card
        assert "Intended use and limitations" not in card
        assert "9,999" in card
        assert "![Samples of the model](samples.png)" in card
        assert "# ours" in card
        assert card_errors(card) == []


def test_a_card_written_by_a_person_keeps_every_word(make_model):
    folder = make_model()
    own = "---\ntags: art\nlicense: other\n---\n\n# Mine\r\n\r\nAll mine.\r\n"
    (folder / "README.md").write_bytes(own.encode())
    card = write_card(folder, FACTS).read_text("utf-8")
    assert "# Mine\n\nAll mine.\n" in card
    assert "## Usage" not in card
    assert metadata(card)["license"] == "other"
    assert metadata(card)["tags"] == ["ddpm", "ddpm-hf", "art"]
    assert metadata(card)["pipeline_tag"] == "unconditional-image-generation"


def test_what_was_known_of_other_weights_is_forgotten(make_model):
    folder = make_model()
    write_card(folder, FACTS)
    edit(folder, ("tags:", "language: en\ntags:"))
    make_model(bias=1.0)  # trained anew, in the same folder
    card = card_of(folder)
    assert "3.17" not in card
    assert "3,400" not in card
    assert "# digits" in card  # its place on the Hub is the same
    assert "model-index" not in metadata(card)
    assert metadata(card)["language"] == "en"


def test_results_of_others_stay_beside_ours(make_model):
    folder = make_model()
    write_card(folder, FACTS)
    edit(folder, ("      value: 3.17", "      value: 3.2"))
    add_result(folder, "kid", 0.5)
    inception = EvalResult("unconditional-image-generation", "cifar10", "CIFAR-10", "inception_score", 9.46)
    write_card(folder, CardFacts(results=[FID, inception]))
    assert published(folder) == ("digits", {"fid": 3.2, "kid": 0.5, "inception_score": 9.46})


def add_result(folder, kind, value):
    """What a person writes into the metadata by hand."""
    _, front, text = card_of(folder).split("---", 2)
    data = yaml.safe_load(front)
    place = {"task": {"type": "unconditional-image-generation"}, "dataset": {"name": "Mine", "type": "mine"}}
    data["model-index"][0]["results"].append({**place, "metrics": [{"type": kind, "value": value}]})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(data)}---{text}", "utf-8")


def published(folder):
    """The model's name and the results in the metadata."""
    (index,) = metadata(card_of(folder)).get("model-index") or [{"name": None, "results": []}]
    return index["name"], {m["type"]: m["value"] for r in index["results"] for m in r["metrics"]}


def test_a_result_of_other_weights_is_removed_where_the_folder_was_renamed(make_model, tmp_path):
    results = CardFacts(results=[FID])
    write_card(make_model(), results)
    folder = (tmp_path / "model").rename(tmp_path / "renamed")
    write_card(folder, results)
    assert published(folder) == ("renamed", {"fid": 3.17})
    make_model("renamed", bias=1.0)
    assert "model-index" not in metadata(card_of(folder))
    assert "3.17" not in card_of(folder)


def test_a_result_of_other_weights_is_removed_where_a_person_has_added_one(make_model):
    folder = make_model()
    write_card(folder, CardFacts(results=[FID]))
    add_result(folder, "kid", 0.5)
    make_model(bias=1.0)
    assert published(folder) == ("model", {"kid": 0.5})
    write_card(folder, CardFacts(results=[replace(FID, metric_value=2.9)]))
    assert published(folder) == ("model", {"kid": 0.5, "fid": 2.9})


def test_a_persons_name_and_removal_are_kept_without_keeping_other_results(make_model):
    folder = make_model()
    inception = EvalResult("unconditional-image-generation", "cifar10", "CIFAR-10", "inception_score", 9.46)
    write_card(folder, CardFacts(results=[FID, inception]))
    edit(folder, ("- name: model", "- name: Mine"), ("    - type: fid\n      value: 3.17\n      name: FID (50k)\n", ""))
    write_card(folder)
    assert published(folder) == ("Mine", {"inception_score": 9.46})
    make_model(bias=1.0)
    assert published(folder) == (None, {})


@pytest.mark.parametrize("own", [b"---\na: [1\n---\n# Mine", b"---\n- a\n---\n# Mine", b"# M\xefne"])
def test_an_unreadable_card_is_not_touched(make_model, own):
    folder = make_model()
    (folder / "README.md").write_bytes(own)
    with pytest.raises(ValueError, match=r"README\.md.*fix"):
        write_card(folder, FACTS)
    with pytest.warns(UserWarning, match="the model is saved, but not its card"):
        DDPMPipelineCustom.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == own


@pytest.mark.parametrize("own", ["5", "{name: x}", "[x]", "[{name: x, results: [1]}]"])
def test_unreadable_results_are_named(make_model, own):
    folder = make_model()
    (folder / "README.md").write_text(f"---\nmodel-index: {own}\n---\n# Mine", "utf-8")
    with pytest.raises(ValueError, match="`model-index` of README.md is not a list of results: fix it"):
        write_card(folder, FACTS)
    assert own in card_of(folder)
    write_card(folder)  # nothing to add
    assert metadata(card_of(folder))["model-index"] == yaml.safe_load(own)


def test_a_card_of_version_0_1_0_is_updated(tmp_path):
    """Unedited sections are rewritten, edited ones stay, and no recorded fact is lost."""
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tests" / "fixtures" / "version_0_1_0" / "run", folder)
    for name in ("samples.png", "real.png", "loss.png"):
        (folder / name).write_bytes(b"png")
    known = set(re.findall(r"^\| (?!Prediction|The network predicts).*\|$", card_of(folder), re.MULTILINE))
    edit(folder, ("## Use\n", "## My usage\n"))
    card = write_card(folder).read_text("utf-8")
    assert "## My usage\n\nWith the package" in card
    assert "## Intended use and limitations" in card
    assert "that makes" not in card
    assert len(known) > 50
    assert known <= set(card.split("\n"))
