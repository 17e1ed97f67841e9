"""The model card: what it says is so, its code runs, the Hub takes it, and a person's words stay."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from diffusers import DDIMScheduler
from huggingface_hub import EvalResult, ModelCard

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.ddpm_repository import EVALUATION_FILES
from ddpm_hf.evaluation.results import evaluation_files
from ddpm_hf.sharing.card import CardFacts, write_card
from support.card_rules import card_errors
from support.evaluation import save_evaluation
from support.hub_server import serve_hub
from support.runs import ROOT

FID = EvalResult("unconditional-image-generation", "cifar10", "CIFAR-10", "fid", 3.17, metric_name="FID (50k)")
FACTS = CardFacts(
    repo_id="me/digits",
    license="mit",
    dataset="`digits`, 1,797 images",
    dataset_ids=["mnist"],
    options={"learning_rate": 2e-3, "use_ema": True, "snr_gamma": None},
    updates=3400,
    images_seen=108_800,
    seconds=3725.4,
    hardware="2 × CPU | core",
    results=[FID],
)


@pytest.fixture
def make_model(make_unet, tmp_path):
    def make(name="model", scheduler=None, bias=0.0, **options):
        unet = make_unet(**options)
        unet.conv_out.bias.data.fill_(bias)
        DDPMPipelineCustom(unet, scheduler or DDPMSchedulerCustom()).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def card_of(folder):
    return (folder / "README.md").read_text("utf-8")


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def edit(folder, *replacements):
    text = card_of(folder)
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    (folder / "README.md").write_text(text, "utf-8")


# --- what it says --------------------------------------------------------------------------------------------------


def test_the_card_says_what_is_known(make_model):
    folder = make_model()
    for name in ("samples.png", "real.png", "loss.png"):
        (folder / name).write_bytes(b"png")
    card = write_card(folder, FACTS).read_text("utf-8")
    assert metadata(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "license": "mit",
        "datasets": ["mnist"],
        "tags": ["ddpm", "ddpm-hf"],
        "model-index": [
            {
                "name": "digits",
                "results": [
                    {
                        "task": {"type": "unconditional-image-generation"},
                        "dataset": {"name": "CIFAR-10", "type": "cifar10"},
                        "metrics": [{"type": "fid", "value": 3.17, "name": "FID (50k)"}],
                    }
                ],
            }
        ],
    }
    for words in (
        "# digits", "| CIFAR-10 | FID (50k) | 3.17 |", "3,400", "108,800", "1:02:05", "2 × CPU \\| core",
        "| `learning_rate` | `0.002` |", "![Samples of the model](samples.png)", "(real.png)", "(loss.png)",
        "11,767 parameters", "generates\n8×8 RGB images",
    ):  # fmt: skip
        assert words in card
    assert "snr_gamma" not in card


def test_what_is_unknown_is_left_out(make_model):
    card = card_of(make_model())
    assert set(metadata(card)) == {"library_name", "pipeline_tag", "tags"}
    for words in ("None", "unknown", "TODO", "More Information", "## Training", "## Evaluation", "## Samples", ".png"):
        assert words not in card


@pytest.mark.parametrize(
    ("scheduler", "unet", "words"),
    [
        (
            {"variance_type": "learned_range"},
            {"out_channels": 6},
            "The reverse variance is learned. Where steps are skipped, stock diffusers interpolates",
        ),
        ({"variance_type": "learned"}, {"out_channels": 6}, "Stock diffusers can't sample from this model"),
        ({}, {"num_class_embeds": 7}, "requires a class label, 0 to 6, which stock `DDPMPipeline` can't pass"),
        ({"num_train_timesteps": 20}, {}, "ancestral sampling with K = 20"),
    ],
)
def test_what_stock_can_not_do_is_said(make_model, scheduler, unet, words):
    card = card_of(make_model(scheduler=DDPMSchedulerCustom(**scheduler), **unet))
    assert words in card
    assert card_errors(card) == []


def test_the_null_label_of_guidance_is_not_counted_as_a_class(make_model):
    folder = make_model(num_class_embeds=11)
    assert "images of 11 classes." in card_of(folder)
    card = write_card(folder, CardFacts(options={"label_column": "label"})).read_text("utf-8")
    assert "images of 10 classes." in card
    assert "a class label, 0 to 9 (10 is the null label of guidance)" in card


def test_a_card_of_version_0_1_0_is_brought_up_to_date(tmp_path):
    """What nobody has edited gets today's words, what somebody has edited stays, and nothing that was known is lost."""
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


def test_cards_of_odd_models_can_be_written(make_model, make_unet, tmp_path):
    pipe = DDPMPipelineCustom(make_unet(sample_size=None), DDIMScheduler())
    pipe.save_pretrained(tmp_path / "odd")
    assert "GFLOP" not in card_of(tmp_path / "odd")
    assert "8×16 2-channel images" in card_of(make_model("wide", channels=2, sample_size=(8, 16)))


@pytest.mark.parametrize("facts", [CardFacts(), FACTS])
def test_the_hub_takes_the_card(make_model, facts):
    card = write_card(make_model(num_class_embeds=3), facts).read_text("utf-8")
    assert card_errors(card) == []
    assert ModelCard(card).data.library_name == "diffusers"


def test_no_secret_and_no_path_gets_into_the_card(make_model, tmp_path):
    options = {
        "output_dir": "out", "train_data_dir": "images", "hub_token": "abc", "hub_model_id": "me/x",
        "push_to_hub": True,
        "model_config_name_or_path": "unet", "note": "hf_ABCDEFGHIJ", "at": str(tmp_path), "home": "~/x", "up": "../x",
        "many": [str(tmp_path)], "windows": "C:\\x", "unet": {"a": 1}, "cache_dir": "c", "seed": 5,
    }  # fmt: skip
    card = write_card(make_model(), CardFacts(options=options)).read_text("utf-8")
    assert re.findall(r"\| `(\w+)` \| `", card) == ["seed"]
    assert str(tmp_path) not in card
    assert "hf_ABC" not in card


def test_values_do_not_break_the_page(make_model):
    facts = CardFacts(dataset="a | b\n\n# <script>", options={"x": "a|b\n--> <b>"}, hardware="}} {% raw %} {{ 7*7 }}")
    card = write_card(make_model(), facts).read_text("utf-8")
    assert "| Data | a \\| b # &lt;script> |" in card
    assert "trained on a | b # &lt;script>." in card
    assert "| `x` | `a\\|b --> &lt;b>` |" in card
    assert "{{ 7*7 }}" in card
    assert card.count("<!--") == card.count("-->") - 1  # that of the option


BPD, NEAREST, FEATURES = ("bpd", {}), ("nearest", {}), ("nearest", {"extractor": "a model"})
OF_BPD = ["likelihood.json", "bits_per_dim.png", "rate_distortion.png"]


@pytest.mark.parametrize(
    ("figures", "names"),
    [
        ([BPD, NEAREST, FEATURES], list(EVALUATION_FILES[1:])),
        ([BPD], OF_BPD),
        ([("bpd", {"calls_per_image": 4})], OF_BPD[:2]),
        ([NEAREST], ["nearest.png"]),
        ([FEATURES, ("fd", {"extractor": "a model"})], ["nearest_features.png"]),
    ],
)
def test_pictures_stand_beside_figures_of_the_same_weights(make_model, figures, names):
    folder = save_evaluation(make_model(), *figures)
    assert evaluation_files(folder) == ["metrics.json", *names]
    card = write_card(folder, CardFacts(results=[FID])).read_text("utf-8")
    assert set(re.findall(r"\((\w+\.png)\)", card)) == {name for name in names if name.endswith(".png")}


def test_pictures_of_other_weights_are_not_shown(make_model):
    folder = save_evaluation(make_model(), BPD, NEAREST, FEATURES)
    make_model(bias=1.0)
    assert evaluation_files(folder) == []
    assert ".png" not in write_card(folder, CardFacts(results=[FID])).read_text("utf-8")


@pytest.mark.parametrize("own", ['{"accuracy": 1}', "[]", "{", '{"figures": [1]}', '{"figures": []}'])
def test_a_persons_own_figures_are_no_evaluation(make_model, own):
    folder = save_evaluation(make_model(), BPD)
    (folder / "metrics.json").write_text(own)
    assert evaluation_files(folder) == []


# --- its code ------------------------------------------------------------------------------------------------------


def code_blocks(card):
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize("variant", ["plain", "classes", "learned_range", "learned"])
def test_the_code_of_the_card_runs(make_model, variant, monkeypatch):
    options = {"classes": {"num_class_embeds": 4}, "plain": {}}.get(variant, {"out_channels": 6})
    kind = {"variance_type": variant} if variant.startswith("learned") else {}
    folder = make_model(scheduler=DDPMSchedulerCustom(num_train_timesteps=12, **kind), **options)
    monkeypatch.chdir(folder)
    blocks = code_blocks(card_of(folder))
    assert len(blocks) == 4
    for block in blocks:
        names = {}
        exec(compile(block, "README.md", "exec"), names)
        if variant != "learned" or "images" in names:
            assert [image.size for image in names["images"]] == [(8, 8)] * 4


@pytest.mark.slow
def test_the_code_of_a_pushed_card_runs(make_model, tmp_path):
    """By the name on the Hub, in a process of its own with an empty cache."""
    folder = make_model(scheduler=DDPMSchedulerCustom(num_train_timesteps=12))
    write_card(folder, CardFacts(repo_id="me/digits"))
    with serve_hub() as hub:
        hub.add_folder("me/digits", folder)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        script = "\n".join([*code_blocks(card_of(folder)), "print([i.size for i in images])"])
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
        )
    assert done.stdout.strip() == str([(8, 8)] * 4), done.stderr


# --- written again -------------------------------------------------------------------------------------------------


def test_writing_again_changes_nothing(make_model):
    folder = make_model()
    once = write_card(folder, FACTS).read_text("utf-8")
    assert write_card(folder, FACTS).read_text("utf-8") == once
    assert write_card(folder).read_text("utf-8") == once  # what was known is still known
    DDPMPipelineCustom.from_pretrained(folder).save_pretrained(folder)
    assert card_of(folder) == once


def test_what_a_person_has_edited_stays_and_the_rest_is_brought_up_to_date(make_model):
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


def test_a_card_of_a_persons_own_keeps_every_word(make_model):
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
    """The name and the values of the metadata."""
    (index,) = metadata(card_of(folder)).get("model-index") or [{"name": None, "results": []}]
    return index["name"], {m["type"]: m["value"] for r in index["results"] for m in r["metrics"]}


def test_a_figure_of_other_weights_goes_where_the_folder_was_renamed(make_model, tmp_path):
    results = CardFacts(results=[FID])
    write_card(make_model(), results)
    folder = (tmp_path / "model").rename(tmp_path / "renamed")
    write_card(folder, results)
    assert published(folder) == ("renamed", {"fid": 3.17})
    make_model("renamed", bias=1.0)
    assert "model-index" not in metadata(card_of(folder))
    assert "3.17" not in card_of(folder)


def test_a_figure_of_other_weights_goes_where_a_person_has_added_one(make_model):
    folder = make_model()
    write_card(folder, CardFacts(results=[FID]))
    add_result(folder, "kid", 0.5)
    make_model(bias=1.0)
    assert published(folder) == ("model", {"kid": 0.5})
    write_card(folder, CardFacts(results=[replace(FID, metric_value=2.9)]))
    assert published(folder) == ("model", {"kid": 0.5, "fid": 2.9})


def test_a_name_and_a_removal_of_a_persons_stay_and_do_not_keep_other_figures(make_model):
    folder = make_model()
    inception = EvalResult("unconditional-image-generation", "cifar10", "CIFAR-10", "inception_score", 9.46)
    write_card(folder, CardFacts(results=[FID, inception]))
    edit(folder, ("- name: model", "- name: Mine"), ("    - type: fid\n      value: 3.17\n      name: FID (50k)\n", ""))
    write_card(folder)
    assert published(folder) == ("Mine", {"inception_score": 9.46})
    make_model(bias=1.0)
    assert published(folder) == (None, {})


@pytest.mark.parametrize("own", [b"---\na: [1\n---\n# Mine", b"---\n- a\n---\n# Mine", b"# M\xefne"])
def test_a_card_that_can_not_be_read_is_not_touched(make_model, own):
    folder = make_model()
    (folder / "README.md").write_bytes(own)
    with pytest.raises(ValueError, match=r"README\.md.*fix"):
        write_card(folder, FACTS)
    with pytest.warns(UserWarning, match="the model is saved, but not its card"):
        DDPMPipelineCustom.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == own


@pytest.mark.parametrize("own", ["5", "{name: x}", "[x]", "[{name: x, results: [1]}]"])
def test_results_that_can_not_be_read_are_named(make_model, own):
    folder = make_model()
    (folder / "README.md").write_text(f"---\nmodel-index: {own}\n---\n# Mine", "utf-8")
    with pytest.raises(ValueError, match="`model-index` of README.md is not a list of results: fix it"):
        write_card(folder, FACTS)
    assert own in card_of(folder)
    write_card(folder)  # nothing to add
    assert metadata(card_of(folder))["model-index"] == yaml.safe_load(own)
