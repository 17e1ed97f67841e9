"""Demos on the Hub: one commit that runs by itself, and edits there that stay."""

import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from functools import partial

import pytest
import yaml

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.cli import main
from ddpm_hf.demo.space import push_space, space_card, stage_app
from ddpm_hf.sampling.onnx_network import write_onnx
from ddpm_hf.sharing.hub import HubTarget
from support.browser import missing
from support.hub_server import NO_DELAYS, TOKEN
from support.models import tiny_unet

PORT = "7893"
# Runs a Space's app.py where nothing can be imported but what its requirements.txt and Gradio bring.
ALONE = """
import re, runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from packaging.requirements import Requirement

def name_of(text):
    return re.sub("[-_.]+", "-", text).lower()

waiting, known = [*Path("requirements.txt").read_text().splitlines(), "gradio"], set()
while waiting:
    requirement = Requirement(waiting.pop())
    name = name_of(requirement.name)
    if name in known or requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    known.add(name)
    try:
        waiting += requires(name) or []
    except PackageNotFoundError:
        pass
strangers = {p for p, names in packages_distributions().items() if not known & {name_of(n) for n in names}}

assert {"matplotlib", "playwright", "onnxruntime"} <= strangers

class Finder(PathFinder):
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in strangers else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Finder]
sys.path.insert(0, ".")
runpy.run_path("app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    DDPMPipelineCustom(tiny_unet(), DDPMSchedulerCustom()).save_pretrained(folder)
    return folder


@pytest.fixture
def gradio():
    if importlib.util.find_spec("gradio") is None:
        missing("no Gradio: pip install 'ddpm-hf[demo]'")


def front_matter(repo):
    return yaml.safe_load(repo.files()["README.md"].decode().split("---")[1])


def start_app(folder, address):
    """Run a Space's app with the packages that the Hub installs for it, and return its configuration."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": PORT, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([sys.executable, "-c", ALONE], cwd=folder, env=environment, stderr=subprocess.PIPE)
    try:
        for _ in range(300):
            time.sleep(0.2)
            assert process.poll() is None, process.stderr.read().decode()
            try:
                return json.load(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/config"))
            except OSError:
                continue
        raise TimeoutError("the app did not start")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_model_and_its_app_are_pushed_and_the_app_runs_by_itself(gradio, model, hub, tmp_path):
    main(["push", str(model), "me/tiny", "--with_demo"])
    assert hub.created["me/tiny-demo"] == ("space", "gradio")
    space, commit = hub.repos["me/tiny-demo"], hub.repos["me/tiny"].branches["main"]
    assert list(space.titles.values()) == ["initial commit", "Demo of tiny"]
    card = front_matter(space)
    assert (card["sdk"], card["app_file"], card["models"]) == ("gradio", "app.py", ["me/tiny"])
    lines = space.files()["requirements.txt"].decode().splitlines()
    assert all("==" in line and "+" not in line for line in lines)
    assert {line.split("==")[0] for line in lines} >= {"torch", "diffusers", "safetensors"}
    assert f"launch_model('me/tiny', '{commit}', 'tiny')".encode() in space.files()["app.py"]
    assert b"spaces/me/tiny-demo" in hub.repos["me/tiny"].files()["README.md"]
    for name, content in space.files().items():
        (tmp_path / "space" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / name).write_bytes(content)
    shown = json.dumps(start_app(tmp_path / "space", hub.url))
    assert "Next seed" in shown
    app = tmp_path / "space" / "app.py"
    app.write_text(app.read_text().replace("me/tiny", "me/gone"))
    assert "there is no model" in json.dumps(start_app(tmp_path / "space", hub.url))


def test_an_app_brings_the_weights_of_a_local_model_and_only_what_it_imports(model, tmp_path):
    stage_app(tmp_path, "tiny", str(model), None)
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (tmp_path / "ddpm_hf" / "training").exists()
    assert (tmp_path / "ddpm_hf" / "__init__.py").is_file()
    assert str(model.parent) not in (tmp_path / "app.py").read_text()


def test_a_push_survives_faults_keeps_edits_and_removes_what_an_earlier_demo_left(hub, model, tmp_path):
    edited = "---\ntitle: Mine\nemoji: 🐈\nsdk: gradio\nsdk_version: 1.0\napp_file: app.py\n---\n\nMy words.\n"
    old = {"README.md": edited.encode(), "app.py": b"", "ddpm_hf/demo/app.py": b"", "notes.txt": b"mine"}
    repo = hub.add_repo("me/demo", old)
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "index.html").write_text("<!doctype html>")
    target = HubTarget("me/demo", TOKEN, repo_type="space", space_sdk="static")
    hub.fail("POST .*/commit/", 503)
    hub.fail("GET /api/spaces/me/demo$", "drop")
    url = push_space(stage, target, "tiny", "me/tiny", NO_DELAYS)
    assert url == f"{hub.url}/spaces/me/demo"
    assert set(repo.files()) == {".gitattributes", "README.md", "index.html", "notes.txt"}
    card = front_matter(repo)
    assert (card["title"], card["emoji"], card["sdk"], card["models"]) == ("Mine", "🐈", "static", ["me/tiny"])
    assert "sdk_version" not in card
    assert card["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert repo.files()["README.md"].decode().endswith("My words.\n")
    push_space(stage, target, "tiny", "me/tiny", NO_DELAYS)
    assert repo.files()["README.md"].decode().count("My words.") == 1


def test_a_space_that_may_not_be_written_is_found_before_anything_is_built(hub, model, monkeypatch):
    def build(*arguments):
        raise AssertionError("built")

    monkeypatch.setattr("ddpm_hf.demo.static_page.write_static_page", build)
    with pytest.raises(SystemExit, match="is not a member of 'other': use me/demo\\.$"):
        main(["demo", str(model), "--static", "--push", "other/demo"])
    with pytest.raises(SystemExit, match="a page may have 0.001 MB"):
        main(["demo", str(model), "--static", "--push", "me/demo", "--max_megabytes", "0.001"])
    assert hub.repos == {}


def test_a_static_space_names_its_page_and_a_local_model_is_no_link():
    card = yaml.safe_load(space_card("static", 'a: "b"', "/").split("---")[1])
    assert (card["title"], card["sdk"], card["app_file"]) == ('a: "b"', "static", "index.html")
    assert "models" not in card


def test_the_export_goes_with_a_push_only_if_asked_and_only_of_these_weights(hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.export.export.write_onnx", partial(write_onnx, quickly=True))
    folder = tmp_path / "tiny"
    DDPMPipelineCustom.from_pretrained(model).save_pretrained(folder)
    with pytest.raises(SystemExit, match="has no export: run `ddpm-hf export` first"):
        main(["push", str(folder), "me/tiny", "--with_onnx"])
    main(["export", str(folder), "--steps", "5"])
    main(["push", str(folder), "me/tiny"])
    assert not any("onnx" in name for name in hub.repos["me/tiny"].files())
    main(["push", str(folder), "me/tiny", "--with_onnx"])
    pushed = hub.repos["me/tiny"].files()
    assert pushed["onnx/model.onnx"] == (folder / "onnx" / "model.onnx").read_bytes()
    assert json.loads(pushed["onnx/sampler.json"])["trajectory"]["num_inference_steps"] == 5
    other = DDPMPipelineCustom.from_pretrained(model)
    other.unet.conv_out.bias.data += 1
    other.save_pretrained(folder)
    with pytest.raises(SystemExit, match="is of other weights"):
        main(["push", str(folder), "me/tiny", "--with_onnx"])
    main(["push", str(folder), "me/tiny"])
    assert not any("onnx" in name for name in hub.repos["me/tiny"].files())
