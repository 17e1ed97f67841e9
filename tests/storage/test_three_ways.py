"""Three ways to load × folder, Hub, offline × saved first and again in each way × what a model may contain."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from support.hub_server import serve_hub
from support.runs import ROOT, SUPPORT

CALIBRATION = {"x_0_error": [0.5, 0.25, 0.125], "num_images": 7}
NAMES = ["cats", "dogs", "birds", "fish"]  # of four labels; the fifth is the null label
VARIANTS = {"calibrated": {}, "classes": {"num_class_embeds": 5}, "learned": {"out_channels": 6}}
SAVED = ("first", "package", "remote", "stock")
CLASSES = {
    "package": ["DDPMPipelineCustom", "DDPMSchedulerCustom"],
    "remote": ["DDPMPipelineCustom", "DDPMSchedulerCustom"],
    "stock": ["DDPMPipeline", "DDPMScheduler"],
    "stock loader": ["DDPMPipeline", "DDPMScheduler"],
    "remote offline": ["DDPMPipelineCustom", "DDPMSchedulerCustom"],
}


def loader(installed, home, hub, offline=False):
    """A function that runs tasks in a new process with its own caches; with or without the package."""

    def run(tasks):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHONPATH"))}
        env |= {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": str(ROOT / "src")} if installed else {}
        env |= {"HF_HUB_OFFLINE": "1"} if offline else {}
        script = [sys.executable, str(SUPPORT / "load_many.py"), "package" if installed else "other"]
        done = subprocess.run(script, input=json.dumps(tasks), capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def tasks(ways, root, saved, *, places=("folder", "hub")):
    """One task for each model and way. Stock diffusers saves no code: that of the first save is used."""
    found = []
    for variant in VARIANTS:
        for way in ways:
            for by in saved:
                for place in places:
                    name, code = (f"me/{by}-{variant}", f"me/first-{variant}")
                    if place == "folder":
                        name, code = str(root / by / variant), str(root / "first" / variant)
                    code = code if by == "stock" else name
                    task = {"way": way, "model": name, "code": code, "labels": variant == "classes"}
                    found.append({**task, "variant": variant, "place": place})
    return found


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """All models saved in every way, loaded in every way, from every place: the results, and the first images."""
    from support.models import tiny_unet

    root = tmp_path_factory.mktemp("matrix")
    for variant, options in VARIANTS.items():
        scheduler = DDPMSchedulerCustom(
            timestep_spacing="linspace", variance_type="learned_range" if variant == "learned" else "fixed_small"
        )
        if variant == "calibrated":
            scheduler.register_to_config(_calibration=CALIBRATION)
        unet = tiny_unet(**options)
        if variant == "classes":
            unet.register_to_config(_label_names=NAMES)
        DDPMPipelineCustom(unet, scheduler).save_pretrained(root / "first" / variant)
    with serve_hub() as hub:

        def publish(by):
            for variant in VARIANTS:
                hub.add_folder(f"me/{by}-{variant}", root / by / variant)

        publish("first")
        mine, nobodys = root / "home-with-package", root / "home-without"
        # the first processes, with empty caches: load what the package has saved, and save it again in each way
        first = []
        for way, run in (("package", loader(True, mine, hub)), ("remote", loader(False, nobodys, hub))):
            again = tasks([way], root, ["first"], places=["hub"])
            again += tasks(["stock"], root, ["first"], places=["hub"]) if way == "remote" else []
            first += run([{**t, "save": str(root / t["way"] / t["variant"])} for t in again])
        for by in ("package", "remote", "stock"):
            publish(by)
        # the second processes, with the same caches; then without a Hub
        second = []
        for ways, run in (
            (["remote", "stock", "stock loader"], loader(False, nobodys, hub)),
            (["package"], loader(True, mine, hub)),
        ):
            second += run([{**t, "download": t["place"] == "hub"} for t in tasks(ways, root, SAVED)])
    offline = loader(False, nobodys, hub, True)(tasks(["remote offline", "stock"], root, SAVED, places=["hub"]))
    offline += loader(True, mine, hub, True)(tasks(["package"], root, SAVED, places=["hub"]))
    return root, first, second, offline


def results(everything):
    return [result for part in everything[1:] for result in part]


@pytest.mark.slow
def test_every_model_loads_every_way_from_everywhere(everything):
    _, first, second, offline = everything
    assert (len(first), len(second), len(offline)) == (9, 3 * 4 * 4 * 2, 3 * 3 * 4)
    for result in results(everything):
        assert result["classes"] == CLASSES[result["task"]["way"]]


@pytest.mark.slow
def test_images_are_the_same_however_a_model_was_saved_and_loaded(everything):
    expected = {r["task"]["variant"]: r["image"] for r in everything[1] if r["task"]["way"] == "package"}
    for result in results(everything):
        if not result["task"]["way"].startswith("stock"):
            np.testing.assert_allclose(result["image"], expected[result["task"]["variant"]], atol=1e-6)
        else:  # the learned range spans another step there
            tolerance = 0.5 if result["task"]["variant"] == "learned" else 1e-3
            np.testing.assert_allclose(result["image"], expected[result["task"]["variant"]], atol=tolerance)


@pytest.mark.slow
def test_calibration_data_survives(everything):
    for result in results(everything):
        assert result["calibration"] == (CALIBRATION if result["task"]["variant"] == "calibrated" else None)


@pytest.mark.slow
def test_names_of_classes_survive_and_stand_for_numbers(everything):
    """`load_many` asks for label 3 by number in stock, and else by its name; the images are compared above."""
    for result in results(everything):
        assert result["label_names"] == (NAMES if result["task"]["variant"] == "classes" else None)


@pytest.mark.slow
def test_no_load_causes_a_warning(everything):
    for result in results(everything):  # but of the network, by diffusers, where there is none
        assert [t for t in result["messages"] if "Couldn't connect to the Hub" not in t] == [], result["task"]


@pytest.mark.slow
def test_what_is_saved_holds_no_path_and_is_readable(everything):
    root = everything[0]
    for by in ("first", "package", "remote"):
        for file in (root / by).rglob("*"):
            if file.is_file():
                assert str(root).encode() not in file.read_bytes(), file
                assert b"127.0.0.1" not in file.read_bytes(), file
                assert file.stat().st_mode & 0o044 == 0o044, file
    for variant in VARIANTS:
        for file in ("pipeline.py", "scheduling_ddpm_custom.py", "ddpm_process.py"):
            assert (root / "remote" / variant / file).read_bytes() == (root / "first" / variant / file).read_bytes()
