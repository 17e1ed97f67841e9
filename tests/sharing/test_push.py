"""Pushing, with the real client against a Hub on this machine that breaks in every way that the real one does."""

import contextlib
import logging
import re
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, snapshot_download
from safetensors.torch import load_file

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.cli import main
from ddpm_hf.diffusion.ddpm_repository import EVALUATION_FILES, REAL_IMAGES
from ddpm_hf.sharing.card import CardFacts, write_card
from ddpm_hf.sharing.hub import HubTarget, PushError, Retry
from ddpm_hf.sharing.push import push_folder
from support.evaluation import save_evaluation
from support.hub_server import NO_DELAYS, TOKEN
from support.models import png

BPD = EvalResult("unconditional-image-generation", "digits", "digits", "bpd", 2.5)


MODEL_FILES = {
    "README.md", "model_index.json", "pipeline.py", "scheduling_ddpm_custom.py", "ddpm_process.py", "ddpm_few_steps.py",
    "ddpm_labels.py", "ddpm_repository.py", "ddpm_fast_network.py",
    "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
}  # fmt: skip


def push(folder, repo_id="me/model", facts=None, **options):
    return push_folder(folder, HubTarget(repo_id, TOKEN, **options), facts, retry=NO_DELAYS)


# --- what goes up -----------------------------------------------------------------------------------------------------


def test_only_the_model_goes_up(hub, make_model):
    """Of a training folder, checkpoints, logs, a cached token and anything else are not uploaded."""
    folder = make_model()
    (folder / "samples.png").write_bytes(png())
    for stray in ("logs/train.jsonl", "checkpoint-5/training_state/optimizer.pt", "notes.txt", "unet/old.bin", ".env"):
        (folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / stray).write_text(TOKEN)
    push(folder)
    assert set(hub.repos["me/model"].files()) == MODEL_FILES | {"samples.png", ".gitattributes"}
    assert len(hub.repos["me/model"].commits) == 2


def test_the_uploaded_weights_equal_the_local_ones(hub, make_model, tmp_path):
    folder = make_model()
    pipe = DDPMPipelineCustom.from_pretrained(folder, dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half")
    push(tmp_path / "half")
    (tmp_path / "up.safetensors").write_bytes(hub.repos["me/model"].files()["unet/diffusion_pytorch_model.safetensors"])
    here, there = (
        load_file(tmp_path / "half/unet/diffusion_pytorch_model.safetensors"),
        load_file(tmp_path / "up.safetensors"),
    )
    assert all(there[k].dtype == here[k].dtype and (there[k] == here[k]).all() for k in here)


def test_a_checkpoint_goes_up_without_its_training_state(hub, make_model, tmp_path):
    make_model("run/checkpoint-40")
    (tmp_path / "run/checkpoint-40/training_state").mkdir()
    (tmp_path / "run/checkpoint-40/training_state/optimizer.pt").write_bytes(b"state")
    push(tmp_path / "run/checkpoint-40")
    assert set(hub.repos["me/model"].files()) == MODEL_FILES | {".gitattributes"}


def test_save_pretrained_into_a_training_folder_pushes_the_model_alone(hub, make_model, monkeypatch):
    folder = make_model()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"state")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    pipe.save_pretrained(str(folder), push_to_hub=True, repo_id="me/one")
    pipe.push_to_hub("me/two")
    for name in ("me/one", "me/two"):
        assert set(hub.repos[name].files()) == MODEL_FILES | {".gitattributes"}
        assert f'DDPMPipelineCustom.from_pretrained("{name}")' in hub.repos[name].files()["README.md"].decode()


def test_weights_of_another_model_are_removed(hub, make_model):
    """Existing shards or a pickle would be loaded instead of the new weights."""
    there = {"unet/diffusion_pytorch_model.bin": b"pickle", "unet/diffusion_pytorch_model.fp16.safetensors": b"w"}
    hub.add_repo("me/model", {**there, "their-notes.md": b"stays"})
    push(make_model())
    assert set(hub.repos["me/model"].files()) == MODEL_FILES | {".gitattributes", "their-notes.md"}


OF_EVALUATION = set(EVALUATION_FILES) - {"nearest_features.png", "nearest.png"}  # which show training images


def test_an_evaluation_goes_up_with_its_weights_alone(hub, make_model):
    folder, repo = save_evaluation(make_model(), ("bpd", {}), ("nearest", {})), lambda: hub.repos["me/model"]
    push(folder, facts=CardFacts(results=[BPD]))
    assert set(repo().files()) == MODEL_FILES | OF_EVALUATION | {".gitattributes"}
    shown = set(re.findall(r"\((\w+\.png)\)", repo().files()["README.md"].decode()))
    assert shown == {name for name in OF_EVALUATION if name.endswith(".png")}
    push(make_model("the same"))
    assert set(repo().files()) >= OF_EVALUATION
    make_model(bias=1.0)  # trained on, in the same folder
    push(folder)
    assert set(repo().files()) == MODEL_FILES | {".gitattributes"}
    assert b".png" not in repo().files()["README.md"]
    assert (folder / "nearest.png").exists()


def test_training_images_go_up_on_request_only(hub, make_model):
    folder = save_evaluation(make_model(), ("bpd", {}), ("nearest", {}))
    for name in REAL_IMAGES:
        (folder / name).write_bytes(png(200))
    push(folder)
    files = hub.repos["me/model"].files()
    assert not set(REAL_IMAGES) & set(files)
    assert not any(name in files["README.md"].decode() for name in REAL_IMAGES)
    push(folder, share_training_images=True)
    files = hub.repos["me/model"].files()
    assert {"real.png", "samples_and_real.png", "nearest.png", "report.html"} <= set(files)
    assert "(real.png)" in files["README.md"].decode()


def test_a_dry_run_lists_what_would_go_up_and_sends_nothing(hub, make_model, capsys):
    folder = make_model()
    (folder / "samples.png").write_bytes(png())
    (folder / "real.png").write_bytes(png())
    main(["push", str(folder), "me/model", "--dry_run"])
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert listed == MODEL_FILES | {"samples.png"}
    assert not hub.repos
    assert not hub.received


def secret(tmp_path):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    return file


@pytest.mark.parametrize("name", ["samples.png", "README.md", "unet/config.json", "metrics.json", "unet"])
def test_links_out_of_a_cloned_folder_are_refused(hub, make_model, tmp_path, name):
    """Otherwise a repository with a link `samples.png` → the user's token would publish the token."""
    folder, outside = make_model(), secret(tmp_path)
    if name == "unet":
        outside = tmp_path / "elsewhere"
        shutil.move(folder / "unet", outside)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link to a file outside the model's folder: replace it by a copy"):
        push(folder)
    assert not hub.received


@pytest.mark.parametrize("name", ["samples.png", "loss.png", "metrics.json"])
def test_files_are_what_their_names_say(hub, make_model, name):
    folder = make_model()
    (folder / name).write_text(TOKEN)
    with pytest.raises(ValueError, match=rf"{name}' is not a valid (PNG picture|JSON file).*: repair or remove it"):
        push(folder)
    assert not hub.received


def test_save_pretrained_into_a_folder_with_traps_follows_no_link(hub, make_model, tmp_path, monkeypatch):
    folder = make_model()
    (folder / "samples.png").symlink_to(secret(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    DDPMPipelineCustom.from_pretrained(folder).save_pretrained(str(folder), push_to_hub=True, repo_id="me/one")
    assert set(hub.repos["me/one"].files()) == MODEL_FILES | {".gitattributes"}


def test_a_snapshot_of_the_hub_whose_files_are_links_into_its_cache_goes_up(hub, make_model):
    push(make_model())
    snapshot = Path(snapshot_download("me/model"))
    assert (snapshot / "unet" / "config.json").is_symlink()
    push(snapshot, "me/again")
    assert set(hub.repos["me/again"].files()) == MODEL_FILES | {".gitattributes"}


def test_metrics_in_a_repository_without_a_card_of_ours_stay(hub, make_model):
    hub.add_repo("me/model", {"metrics.json": b"{}", "README.md": b"# Mine"})
    push(make_model())
    assert hub.repos["me/model"].files()["metrics.json"] == b"{}"


def test_private_repositories_tags_branches_and_pull_requests(hub, make_model):
    folder = make_model()
    push(folder, "lab/model", private=True, tag="v1")
    repo = hub.repos["lab/model"]
    assert repo.private
    assert repo.tags == {"v1": repo.branches["main"]}

    other = make_model("other", bias=1.0)
    push(other, "lab/model", revision="second")
    assert set(repo.branches) == {"main", "second"}
    assert (
        repo.files("second")["unet/diffusion_pytorch_model.safetensors"]
        != repo.files()["unet/diffusion_pytorch_model.safetensors"]
    )
    with pytest.raises(ValueError, match="`tag` is 'v1'.*already has that tag"):
        push(other, "lab/model", revision="second", tag="v1")

    hub.add_repo("stranger/theirs")
    assert push(folder, "stranger/theirs", create_pr=True).endswith("/stranger/theirs/discussions/1")
    assert set(hub.repos["stranger/theirs"].files("refs/pr/1")) == MODEL_FILES | {".gitattributes"}
    assert set(hub.repos["stranger/theirs"].files()) == {".gitattributes"}


def test_a_name_without_owner_is_mine(hub, make_model):
    push(make_model(), "model")
    assert set(hub.repos) == {"me/model"}


# --- what the Hub does not take ---------------------------------------------------------------------------------------


def damage(folder, kind):
    weights, config = folder / "unet/diffusion_pytorch_model.safetensors", folder / "unet/config.json"
    if kind == "missing":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "shapes":
        config.write_text(config.read_text().replace('"in_channels": 3', '"in_channels": 4'))
    elif kind == "json":
        (folder / "model_index.json").write_text("{")
    elif kind == "no scheduler":
        shutil.rmtree(folder / "scheduler")
    elif kind == "no folder":
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["missing", "truncated", "shapes", "json", "no scheduler", "no folder"])
def test_a_damaged_model_leaves_nothing_on_the_hub(hub, make_model, kind):
    folder = make_model()
    damage(folder, kind)
    with pytest.raises(ValueError, match=r"damaged|no such folder") as caught:
        push(folder)
    assert str(folder) in str(caught.value)
    assert hub.repos == {}


def test_a_card_that_the_hub_rejects_leaves_nothing_there(hub, make_model):
    with pytest.raises(ValueError, match="license"):
        push(make_model(), facts=CardFacts(license="my-own"))
    assert hub.repos == {}


# --- faults -----------------------------------------------------------------------------------------------------------

STAGES = [
    "GET /api/whoami", "GET /api/models/me/model$", "POST /api/repos/create", "GET .*/auth-check",
    "POST /api/validate-yaml", "POST .*/preupload/", "POST .*/objects/batch", "PUT /lfs/", "POST .*/commit/",
    "POST .*/branch/", "GET .*/refs", "POST .*/tag/",
]  # fmt: skip


@pytest.mark.parametrize("faults", [(408, 429, 503), ("drop",), ("lose",)])
def test_passing_faults_at_every_stage_are_survived(hub, make_model, faults, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own waits
    for stage in STAGES:
        for what in faults:
            hub.fail(stage, what)
    target = HubTarget("me/model", TOKEN, revision="branch", tag="v1")
    push_folder(make_model(), target, retry=Retry(delays=(0.0,) * 9))
    repo = hub.repos["me/model"]
    assert set(repo.files("v1")) == MODEL_FILES | {".gitattributes"}
    assert len(repo.commits) == 2  # also where the answer to the commit was lost
    assert sum(f.times for f in hub.faults) == 0


@pytest.mark.parametrize("what", [503, "drop"])
def test_a_fault_that_outlasts_the_client_is_survived(hub, make_model, what, monkeypatch):
    """The client itself retries an upload five times, then raises an error of its own."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("PUT /lfs/", what, times=8)
    push(make_model())
    assert set(hub.repos["me/model"].files()) == MODEL_FILES | {".gitattributes"}


@pytest.mark.parametrize("what", [503, 404, "drop"])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_card_that_cannot_be_fetched_is_not_taken_for_absent(hub, make_model, what, method, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    own = b"---\nlicense: mit\n---\n# All my own words\n"
    hub.add_repo("me/model", {"README.md": own})
    hub.fail(f"{method} .*/resolve/", what, times=2)
    with pytest.raises(ValueError, match="404") if what == 404 else contextlib.nullcontext():
        push(make_model())
    assert b"# All my own words" in hub.repos["me/model"].files()["README.md"]


def test_a_lost_answer_makes_no_second_pull_request(hub, make_model):
    hub.add_repo("me/model").pulls.append({"title": "Typo", "author": "somebody"})
    hub.fail(r"POST .*/commit/main", "lose")
    assert push(make_model(), create_pr=True).endswith("/me/model/discussions/2")
    assert len(hub.repos["me/model"].pulls) == 2


@pytest.mark.parametrize("what", [503, "drop"])
def test_a_lasting_fault_is_reported_and_changes_nothing(hub, make_model, what):
    folder = make_model()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    hub.fail(r"POST .*/commit/", what, times=99)
    with pytest.raises(PushError, match="can't be reached"):
        push(folder)
    assert hub.count("POST .*/commit/") == len(NO_DELAYS.delays) + 1
    assert set(hub.repos["me/model"].files()) == {".gitattributes"}
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_refusal_is_not_retried(hub, make_model):
    hub.fail(r"POST .*/commit/", 403, times=99)
    with pytest.raises(ValueError, match="may not write"):
        push(make_model())
    assert hub.count("POST .*/commit/") == 1


def test_a_concurrent_commit_of_somebody_else_is_not_undone(hub, make_model):
    folder = make_model()
    push(folder)
    repo = hub.repos["me/model"]
    edited = repo.files()["README.md"].replace(b"# model", b"# My own title")
    hub.before_commit = lambda: repo.commit("main", "edit", {**repo.files(), "README.md": edited}, "x")
    push(make_model("other", bias=1.0))
    assert b"# My own title" in repo.files()["README.md"]


# --- the card on the Hub ----------------------------------------------------------------------------------------------


def test_what_was_edited_on_the_hub_stays(hub, make_model):
    folder = make_model()
    push(folder)
    repo = hub.repos["me/model"]
    card = repo.files()["README.md"].decode()
    card = card.replace("tags:", "language: en\ntags:\n- mine").replace(
        "## Sampling steps", "Words of mine.\n\n## Steps"
    )
    repo.commit("main", "edited in the browser", {**repo.files(), "README.md": card.encode()}, "x")
    write_card(folder, CardFacts(hardware="a fast one"))
    push(folder)
    card = repo.files()["README.md"].decode()
    assert "language: en" in card
    assert "- mine" in card
    assert "Words of mine.\n\n## Steps" in card
    assert "a fast one" in card


def test_what_the_hub_knows_of_the_same_weights_stays(hub, make_model):
    """Measured and pushed on another machine."""
    fid = EvalResult("unconditional-image-generation", "cifar10", "CIFAR-10", "fid", 3.17)
    push(make_model("there"), facts=CardFacts(results=[fid], license="mit"))
    push(make_model("here"), facts=CardFacts(hardware="a fast one"))
    card = hub.repos["me/model"].files()["README.md"].decode()
    assert "| CIFAR-10 | fid | 3.17 |" in card
    assert "value: 3.17" in card
    assert "license: mit" in card
    assert "a fast one" in card
    push(make_model("other", bias=1.0))
    assert "3.17" not in hub.repos["me/model"].files()["README.md"].decode()


def test_push_to_hub_keeps_what_was_edited_on_the_hub(hub, make_model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pipe = DDPMPipelineCustom.from_pretrained(make_model())
    pipe.push_to_hub("me/model")
    repo = hub.repos["me/model"]
    card = repo.files()["README.md"].replace(b"## Usage", b"## My usage")
    repo.commit("main", "edited in the browser", {**repo.files(), "README.md": card}, "x")
    pipe.push_to_hub("me/model")
    assert b"## My usage" in repo.files()["README.md"]


@pytest.mark.parametrize("own", [b"---\na: [\n---\nMine.", b"M\xefne."])
def test_an_unreadable_card_on_the_hub_is_not_replaced(hub, make_model, own):
    hub.add_repo("me/model", {"README.md": own})
    with pytest.raises(ValueError, match="card of 'me/model' on the Hub can't be read"):
        push(make_model())
    assert len(hub.repos["me/model"].commits) == 1


def test_what_was_edited_here_goes_up(hub, make_model):
    folder = make_model()
    push(folder)
    readme = folder / "README.md"
    for words in ("First thoughts.", "Second thoughts."):
        readme.write_text(re.sub(r"(?:\w+ thoughts\.\n\n)?## Citation", f"{words}\n\n## Citation", readme.read_text()))
        push(folder)
        assert words in hub.repos["me/model"].files()["README.md"].decode()
    assert "First thoughts" not in hub.repos["me/model"].files()["README.md"].decode()


# --- the token --------------------------------------------------------------------------------------------------------


def test_the_token_is_in_nothing_that_is_written_logged_or_sent(hub, make_model, tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own waits
    caplog.set_level(logging.DEBUG)
    folder, texts = make_model(), []
    write_card(folder, CardFacts(options={"hub_token": TOKEN, "note": f"it is {TOKEN}", "seed": 1}))
    target = HubTarget("me/model", TOKEN)
    push_folder(folder, target, retry=Retry(texts.append))
    for fault in (401, 403, 404, 400, 503, "drop"):
        hub.fail(r"/commit/", fault, times=3)
        make_model("model", bias=1.0 + len(texts))
        try:
            push_folder(folder, target, retry=Retry(texts.append, (0.0,)))
        except (ValueError, OSError) as error:
            texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
    out = capsys.readouterr()
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    everything = [written, *hub.received, *(repr(t).encode() for t in [*texts, out, caplog.text, target])]
    assert len(texts) >= 6 * 3
    assert not any(TOKEN.encode() in part for part in everything)
