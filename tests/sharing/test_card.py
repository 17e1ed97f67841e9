"""The model card: what it says is so, its code runs, and the Hub takes it."""

import re

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.ddpm_repository import EVALUATION_FILES
from ddpm_hf.evaluation.results import evaluation_files
from ddpm_hf.sharing.card import CardFacts, write_card
from support.card_rules import card_errors
from support.cards import FACTS, FID, card_of, code_blocks, metadata
from support.evaluation import save_evaluation

# --- what it says -----------------------------------------------------------------------------------------------------


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
        ({"variance_type": "learned"}, {"out_channels": 6}, "Stock diffusers can't sample from this model"),
        ({}, {"num_class_embeds": 7}, "requires a class label, 0 to 6, which stock `DDPMPipeline` can't pass"),
        ({"num_train_timesteps": 20}, {}, "ancestral sampling with K = 20"),
    ],
)
def test_the_card_says_what_stock_diffusers_cannot_do(make_model, scheduler, unet, words):
    card = card_of(make_model(scheduler=DDPMSchedulerCustom(**scheduler), **unet))
    assert words in card
    assert card_errors(card) == []


def test_the_null_label_of_guidance_is_not_counted_as_a_class(make_model):
    folder = make_model(num_class_embeds=11)
    assert "images of 11 classes." in card_of(folder)
    card = write_card(folder, CardFacts(options={"label_column": "label"})).read_text("utf-8")
    assert "images of 10 classes." in card
    assert "a class label, 0 to 9 (10 is the null label of guidance)" in card


def test_classes_are_listed_by_name_without_the_null_label(make_unet, tmp_path):
    unet = make_unet(num_class_embeds=3)
    unet.register_to_config(_label_names=["cats", "<!-- /ddpm-hf:about --> | dogs"])
    DDPMPipelineCustom(unet, DDPMSchedulerCustom()).save_pretrained(tmp_path / "pets")
    card = card_of(tmp_path / "pets")
    assert "images of 2 classes." in card
    assert "| Classes | 0 cats, 1 &lt;!-- /ddpm-hf:about --> \\| dogs |" in card
    assert 'class_labels="cats")' in card
    assert "by name or number, 0 to 1 (2 is the null label of guidance)" in card
    assert card_errors(card) == []


def test_a_card_shows_the_first_of_many_classes(make_unet, tmp_path):
    unet = make_unet(num_class_embeds=30)
    unet.register_to_config(_label_names=[f"kind {i}" for i in range(30)])
    DDPMPipelineCustom(unet, DDPMSchedulerCustom()).save_pretrained(tmp_path / "many")
    assert "18 kind 18, 19 kind 19, … (all 30 in `unet/config.json`) |" in card_of(tmp_path / "many")


def test_cards_of_odd_models_can_be_written(make_model, make_unet, tmp_path):
    pipe = DDPMPipelineCustom(make_unet(sample_size=None), DDIMScheduler())
    pipe.save_pretrained(tmp_path / "odd")
    assert "GFLOP" not in card_of(tmp_path / "odd")
    assert "8×16 2-channel images" in card_of(make_model("wide", channels=2, sample_size=(8, 16)))


@pytest.mark.parametrize("facts", [CardFacts(), FACTS])
def test_the_hub_accepts_the_card(make_model, facts):
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
def test_plots_are_shown_beside_results_of_the_same_weights(make_model, figures, names):
    folder = save_evaluation(make_model(), *figures)
    assert evaluation_files(folder) == ["metrics.json", *names]
    card = write_card(folder, CardFacts(results=[FID])).read_text("utf-8")
    assert set(re.findall(r"\((\w+\.png)\)", card)) == {name for name in names if name.endswith(".png")}


def test_plots_of_other_weights_are_not_shown(make_model):
    folder = save_evaluation(make_model(), BPD, NEAREST, FEATURES)
    make_model(bias=1.0)
    assert evaluation_files(folder) == []
    assert ".png" not in write_card(folder, CardFacts(results=[FID])).read_text("utf-8")


@pytest.mark.parametrize("own", ['{"accuracy": 1}', "[]", "{", '{"figures": [1]}', '{"figures": []}'])
def test_a_persons_own_metrics_are_not_an_evaluation(make_model, own):
    folder = save_evaluation(make_model(), BPD)
    (folder / "metrics.json").write_text(own)
    assert evaluation_files(folder) == []


# --- its code ---------------------------------------------------------------------------------------------------------


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
