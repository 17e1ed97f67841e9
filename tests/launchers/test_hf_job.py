"""training/launch/hf_job.py: what Hugging Face Jobs runs, and how an attempt goes on where the one before was."""

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.storage.checkpoint import checkpoint_steps
from support.launching import SMALL, node_env, start_script, wait_until
from support.runs import ROOT

SCRIPT = ROOT / "training" / "launch" / "hf_job.py"
Mirror = runpy.run_path(str(SCRIPT))["Mirror"]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(folder, **files):
    for name, text in files.items():
        file = folder / name.replace("__", "/").replace("_json", ".json").replace("_lock", ".lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_the_command_in_the_script_is_one_that_the_client_takes():
    """As far as a dry run goes: it resolves the job and submits nothing."""
    command = re.search(r"hf jobs uv run (.*?)\n\n", SCRIPT.read_text(), re.DOTALL)[1].replace("\\\n", " ")
    hf = Path(sys.executable).parent / "hf"
    done = subprocess.run(
        [hf, "jobs", "uv", "run", "--dry-run", *command.split()], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    said = re.sub(" +", " ", done.stdout)
    assert "script training/launch/hf_job.py" in said
    assert "args --config cifar10 --train_batch_size 16 --output_dir /output/cifar10" in said
    assert "attempts 3" in said
    assert "volumes ./dist:/wheels hf://buckets/me/my-ddpm:/output" in " ".join(said.split())


def test_the_metadata_of_the_script_ask_for_this_package_from_the_first_volume_alone():
    block = re.match(r"# /// script\n(.*?)# ///\n", SCRIPT.read_text(), re.DOTALL)[1]
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata["requires-python"] == project["requires-python"]
    (dependency,) = metadata["dependencies"]
    name, extras = re.fullmatch(r"([\w-]+)\[([\w,]+)\]", dependency).groups()
    assert name == project["name"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (index,) = metadata["tool"]["uv"]["index"]
    assert metadata["tool"]["uv"]["sources"][name]["index"] == index["name"]
    assert index["explicit"]  # nothing else is looked for there, and this package nowhere else


def test_what_is_complete_is_copied_and_what_is_gone_is_removed(tmp_path):
    mirror = Mirror(tmp_path / "work", tmp_path / "volume")
    mirror.restore()  # nothing yet
    write(tmp_path / "work", log="1", checkpoint_3__manifest_json="{}", checkpoint_3__weights="w")
    write(tmp_path / "work", _lock="", **{"checkpoint_6.partial__weights": "half"})
    mirror.update()
    assert contents(tmp_path / "volume") == {
        "log": "1",
        "checkpoint_3/manifest.json": "{}",
        "checkpoint_3/weights": "w",
    }
    shutil.rmtree(tmp_path / "work" / "checkpoint_3")
    write(tmp_path / "work", log="1, 2", checkpoint_6__manifest_json="{}")
    mirror.update()
    assert contents(tmp_path / "volume") == {"log": "1, 2", "checkpoint_6/manifest.json": "{}"}
    assert not (tmp_path / "volume" / "checkpoint_3").exists()

    another_machine = Mirror(tmp_path / "elsewhere" / "work", tmp_path / "volume")
    another_machine.restore()
    assert contents(tmp_path / "elsewhere" / "work") == contents(tmp_path / "volume")
    (tmp_path / "elsewhere" / "work" / "log").unlink()
    another_machine.update()
    assert contents(tmp_path / "volume") == {"checkpoint_6/manifest.json": "{}"}


def test_a_checkpoint_that_could_not_be_copied_whole_has_no_manifest(tmp_path):
    write(tmp_path / "work", checkpoint_3__manifest_json="{}", checkpoint_3__weights="w")
    write(tmp_path / "volume", checkpoint_3__weights__in_the_way="")
    with pytest.raises(IsADirectoryError):
        Mirror(tmp_path / "work", tmp_path / "volume").update()
    assert not (tmp_path / "volume" / "checkpoint_3" / "manifest.json").exists()


@pytest.mark.slow
def test_the_second_attempt_goes_on_where_the_first_was_stopped(pictures, tmp_path):
    volume = tmp_path / "volume" / "my-ddpm"
    options = [*SMALL, "--train_data_dir", str(pictures), "--max_train_steps", "60", "--save_images_steps", "0"]
    options += ["--output_dir", str(volume)]
    env, log = node_env(tmp_path / "machine0"), tmp_path / "first.log"
    first = start_script(SCRIPT, *options, env=env, log=log)
    wait_until(lambda: list((tmp_path / "machine0").rglob("checkpoint-4")), [first])
    first.process.terminate()
    status, output = first.wait()
    assert status == 128 + 15
    step = max(checkpoint_steps(volume))
    assert f"Stopped after {step} updates" in output
    env, log = node_env(tmp_path / "machine1"), tmp_path / "second.log"
    status, output = start_script(SCRIPT, *options, env=env, log=log).wait()
    assert status == 0, output
    assert f"checkpoint-{step}." in output
    assert max(checkpoint_steps(volume)) == 60
    assert DDPMPipelineCustom.from_pretrained(volume).unet.config.sample_size == 16
    assert not list(volume.rglob("*.partial"))
