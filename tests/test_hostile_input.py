"""Whatever a stranger puts into a file that we read: an answer or one line, in bounded time and memory, and no code."""

# ruff: noqa: PT017  (inputs that are sound raise nothing)

import json
import math
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.data.cache import read_survey
from ddpm_hf.diffusion.ddpm_few_steps import Calibration, fingerprint
from ddpm_hf.diffusion.ddpm_labels import label_names
from ddpm_hf.evaluation.results import Result, read_results
from ddpm_hf.sampling.folder import sample_to_folder
from ddpm_hf.sharing.card import CardFacts, known_facts, write_card
from ddpm_hf.sharing.card_merge import merge_cards, parse_card, stamp
from ddpm_hf.sharing.conversion.convert import read_weights
from ddpm_hf.storage.checkpoint import TrainingState, check_intact, latest_checkpoint, read_progress
from ddpm_hf.storage.files import read_json
from ddpm_hf.storage.loading import load_pipeline
from ddpm_hf.training.state import _check_tensors
from support.runs import ROOT

pytestmark = pytest.mark.filterwarnings("ignore")
FIXTURE = ROOT / "tests" / "fixtures" / "version_0_1_0" / "run"
SETTINGS = settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(10**12), 10**12), st.floats(), st.sampled_from([0, 1, -1, 2**31, 10**9, math.inf, math.nan])
)  # fmt: skip
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=12), st.sampled_from(["16", "../../x", "[]"]))
VALUES = st.recursive(LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=3))


def changed(config):
    """A configuration with one to three of its keys set to anything, or removed."""
    changes = st.dictionaries(st.sampled_from(sorted(config)), st.one_of(VALUES, st.just(...)), min_size=1, max_size=3)
    return changes.map(lambda c: {k: v for k, v in {**config, **c}.items() if v is not ...})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder to spoil, small enough to be copied often."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shutil.copytree(FIXTURE, folder, ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    scheduler.pop("_calibration")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), "utf-8")
    return folder


@SETTINGS
@given(
    data=st.data(), name=st.sampled_from(["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
)
def test_a_spoilt_configuration_gives_a_model_or_one_line(model, data, name):
    file = model / name
    before = file.read_text("utf-8")
    started = time.process_time()
    try:
        file.write_text(json.dumps(data.draw(changed(json.loads(before)))), "utf-8")
        load_pipeline(str(model))
    except ValueError as error:
        assert str(error)
    finally:
        file.write_text(before, "utf-8")
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("unet/config.json", {"sample_size": "16"}, "sample_size = '16', but must have integers"),
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block = 1000000000, but must have"),
        ("model_index.json", {"unet": ["diffusers", "UNet2DConditionModel"]}, "damaged|must be a UNet2DModel"),
        ("model_index.json", {"unet": ["os", "system"]}, "damaged|can not be loaded|cannot be loaded"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps.*1000000000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 3 * 10**7}, "num_train_timesteps.*30000000"),
    ],
)
def test_what_is_wrong_is_named(model, tmp_path, name, change, message):
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **change}), "utf-8")
    with pytest.raises(ValueError, match=message):
        load_pipeline(str(tmp_path / "model"))


def test_a_model_index_runs_no_code(model, tmp_path):
    """Neither a file of the folder named as a module, nor one that stands where the pipeline's code does."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (folder / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    load_pipeline(str(folder))
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    (folder / "model_index.json").write_text(json.dumps({**index, "unet": ["evil", "Evil"]}), "utf-8")
    with pytest.raises(ValueError, match="evil is not one of the libraries"):
        load_pipeline(str(folder))
    assert not (tmp_path / "ran").exists()


def card():
    return stamp("---\nlicense: mit\n---\n<!-- ddpm-hf:about -->\n# A\n<!-- /ddpm-hf:about -->\n", {"weights": "w"})


@SETTINGS
@given(st.text(st.sampled_from("-\n {}[]:&*#<>!adpm/h"), max_size=400), st.text(max_size=80))
def test_any_text_is_a_card_or_one_line(front, text):
    for content in (f"---\n{front}\n---\n{text}", front + text, card() + text, front + card()):
        try:
            merged = merge_cards(content, card())
            parse_card(merged)
        except ValueError as error:
            assert "README.md" in str(error)


@SETTINGS
@given(VALUES)
def test_any_record_in_a_card_is_read_as_far_as_it_is_sound(record):
    text = f"# Mine\n\n<!-- ddpm-hf generated the sections above: {json.dumps(record)} -->\n"
    assert "# Mine" in merge_cards(text, card())
    assert isinstance(known_facts(text, "w"), CardFacts)


@SETTINGS
@given(st.dictionaries(st.sampled_from(["repo_id", "options", "updates", "results", "seconds", "dataset_ids"]), VALUES))
def test_forged_facts_break_no_card(model, facts):
    text = f"# Mine\n\n<!-- ddpm-hf generated the sections above: {json.dumps({'facts': facts, 'weights': 'w'})} -->\n"
    assert isinstance(known_facts(text, "w"), CardFacts)


@pytest.mark.parametrize(
    "content",
    [
        "---\n" + "\n" * 200_000 + "x",
        "<!-- ddpm-hf:about -->" + " " * 200_000,
        "\n" * 200_000 + "<!-- ddpm-hf generated the sections above: {",
        "<!-- ddpm-hf:a -->" * 20_000,
        "---\na: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{c}: &{c} [{', '.join([f'*{chr(ord(c) - 1)}'] * 9)}]\n" for c in "bcdefghi")
        + "---\n",
        "---\n" + "[" * 50_000 + "\n---\n",
        "<!-- ddpm-hf generated the sections above: " + "[" * 100_000 + " -->",
        "x" * 2_000_000,
    ],
    ids=["newlines", "blanks", "lines before a record", "markers", "aliases", "nested", "nested record", "long"],
)
def test_hostile_cards_take_no_time(content):
    started = time.process_time()
    try:
        merge_cards(content, card())
    except ValueError as error:
        assert "README.md" in str(error)
    assert time.process_time() - started < 20  # CPU seconds; a cubic scan takes hours


def test_a_card_of_a_stranger_leads_to_no_traceback(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    record = {
        "facts": {"options": [1], "results": [3], "dataset": {"a": 1}},
        "sections": [1],
        "weights": 4,
        "whole": [],
    }
    (folder / "README.md").write_text(f"# A\n<!-- ddpm-hf generated the sections above: {json.dumps(record)} -->\n")
    write_card(folder)
    assert "# A" in (folder / "README.md").read_text("utf-8")


@SETTINGS
@given(st.data())
def test_any_calibration_is_sound_or_one_line(data):
    scheduler = DDPMSchedulerCustom(10, beta_schedule="squaredcos_cap_v2")
    table = torch.full((10,), 0.1, dtype=torch.float64)
    fits = fingerprint(scheduler.process, scheduler.config)
    stored = Calibration(table, table, table, table, 16, fits).to_config()
    try:
        read = Calibration.from_config(data.draw(changed(stored)), fits)
    except ValueError as error:
        assert "calibrate this model again" in str(error)
    else:
        assert read.x_0_error.isfinite().all()


@SETTINGS
@given(VALUES)
def test_any_progress_and_manifest_of_a_checkpoint(tmp_path, value):
    folder = tmp_path / "checkpoint-3"
    (folder / "training_state").mkdir(parents=True, exist_ok=True)
    for file in (folder / "manifest.json", folder / "training_state" / "progress.json"):
        file.write_text(json.dumps(value), "utf-8")
    for read in (check_intact, read_progress):
        try:
            read(folder)
        except ValueError as error:
            assert "damaged" in str(error)
    latest_checkpoint(tmp_path)


def test_a_manifest_reads_nothing_outside_of_its_checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "manifest.json").write_text(json.dumps({"../secret": "0"}), "utf-8")
    with pytest.raises(ValueError, match="lies outside of the checkpoint"):
        check_intact(folder)


def test_weights_that_are_a_pickle_are_not_read(model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(DDPMPipelineCustom.from_pretrained(folder).unet.state_dict(), weights.with_suffix(".bin"))
    weights.write_bytes(weights.with_suffix(".bin").read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        load_pipeline(str(folder))


# --- what runs and evaluations leave ----------------------------------------------------------------------------------

CONTENTS = {
    "empty": b"", "null": b"null", "list": b"[]", "number": b"3", "nested": b"[" * 100_000,
    "UTF-16": "{}".encode("utf-16"), "deep": b'{"a":' * 5000 + b"1" + b"}" * 5000, "binary": bytes(range(256)),
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_json_is_read_or_named(content, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(content)
    try:
        read_json(file)
    except ValueError as error:
        assert "x.json' is damaged" in str(error)
    file.write_bytes(bytes(256))
    with pytest.raises(ValueError, match="has 256 bytes, but such a file never has more than 10"):
        read_json(file, 10)


FIGURE = json.loads((FIXTURE.parent / "metrics.json").read_text("utf-8"))["figures"][0]


@SETTINGS
@given(
    st.one_of(
        VALUES, changed(FIGURE), changed(FIGURE["settings"]).map(lambda settings: {**FIGURE, "settings": settings})
    )
)
def test_forged_results_are_sound_or_named(tmp_path, figure):
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps({"figures": [figure]}), "utf-8")
    try:
        for result in read_results(file):
            assert isinstance(result, Result)
            assert result.title
            assert result.for_card()
    except ValueError as error:
        assert "metrics.json' was not written by `ddpm-hf evaluate`" in str(error)


PROGRESS = json.loads((FIXTURE / "checkpoint-3" / "training_state" / "progress.json").read_text("utf-8"))


@SETTINGS
@given(changed(PROGRESS))
def test_forged_progress_holds_what_a_run_computes_with_or_is_named(tmp_path, progress):
    file = tmp_path / "training_state" / "progress.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(progress), "utf-8")
    try:
        read = read_progress(tmp_path)
    except ValueError as error:
        assert "progress.json' is damaged" in str(error)
    else:
        assert read["images_seen"] + read["step"] + read["seconds"] + sum(map(sum, read["unlogged"])) < 2**60
        assert read["num_processes"] * read["config"]["train_batch_size"] >= 1


def test_tensors_of_a_checkpoint_are_those_of_its_network(make_unet, tmp_path):
    network = make_unet()
    sound = network.state_dict()
    name, weight = next(iter(sound.items()))
    for weights, moments in (
        ({}, {}),
        ({**sound, "evil": weight}, {}),
        ({**sound, name: weight[:1]}, {}),
        (sound, {"evil/exp_avg": weight}),
        (sound, {f"{name}/exp_avg": weight[:1]}),
    ):
        with pytest.raises(ValueError, match="checkpoint-3 is damaged"):
            _check_tensors(tmp_path / "checkpoint-3", TrainingState({}, weights, moments), network)
    _check_tensors(
        tmp_path, TrainingState({}, sound, {f"{name}/exp_avg": weight, f"{name}/step": torch.ones(())}), network
    )


@SETTINGS
@given(VALUES)
def test_any_record_of_samples_is_refused(tmp_path, make_unet, record):
    (tmp_path / "sampling.json").write_text(json.dumps(record), "utf-8")
    (tmp_path / "00000.png").touch()
    pipe = DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom(timestep_spacing="linspace"))
    with pytest.raises(ValueError, match="holds 1 images"):
        sample_to_folder(pipe, tmp_path, 2, 0, 1, num_inference_steps=2, show_progress=False)


@SETTINGS
@given(st.one_of(VALUES, changed({"tried": 3, "unreadable": [], "pixels": "pixels.bin"})))
def test_any_record_of_a_cache_is_read_or_ignored(tmp_path, record):
    (tmp_path / "pixels.bin").write_bytes(bytes(30))
    (tmp_path / "cache.json").write_text(json.dumps(record), "utf-8")
    survey = read_survey(tmp_path / "cache.json", 10)
    assert survey is None or len(survey.readable) <= 3


@SETTINGS
@given(VALUES, st.integers(0, 5))
def test_any_names_of_classes_are_names_or_one_line(names, count):
    try:
        found = label_names({"_label_names": names, "num_class_embeds": count})
    except ValueError as error:
        assert "unet/config.json" in str(error)
    else:
        assert len(set(found)) == len(found) <= count


# --- weights ----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(VALUES, st.binary(max_size=40))
def test_any_header_of_safetensors_is_weights_or_one_line(tmp_path, header, data):
    file = tmp_path / "weights.safetensors"
    head = json.dumps(header).encode()
    for content in (len(head).to_bytes(8, "little") + head + data, data, (2**62).to_bytes(8, "little") + head):
        file.write_bytes(content)
        try:
            read_weights(file)
        except ValueError as error:
            assert "can't be read as plain weights" in str(error)


@pytest.mark.parametrize(
    "content", [b"", b"x", b"PK\x03\x04" + bytes(50), None, [], {}, {1: torch.zeros(3)}, {"ema": {"x": 3}}], ids=repr
)
def test_weight_files_without_weights_are_one_line(content, tmp_path):
    file = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match="can't be read as plain weights"):
        read_weights(file)
