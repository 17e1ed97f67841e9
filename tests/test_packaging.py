"""The wheel: what it holds, and that somebody who has it and nothing of the project's folder can train."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import ddpm_hf
from support.runs import ROOT, TINY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    return file


def test_the_wheel_holds_all_that_the_package_reads(wheel):
    source = ROOT / "src" / "ddpm_hf"
    needed = [*source.rglob("*.py"), *source.rglob("*.yaml"), *source.rglob("README.md"), source / "py.typed"]
    needed += [*(source / "demo" / "page").iterdir()]
    with zipfile.ZipFile(wheel) as files:
        for file in needed:
            assert files.read(f"ddpm_hf/{file.relative_to(source).as_posix()}") == file.read_bytes()
        assert files.read("ddpm_hf/model_card.md") == (ROOT / "model_card.md").read_bytes()
        (name,) = (name for name in files.namelist() if name.endswith("dist-info/METADATA"))
        metadata = message_from_bytes(files.read(name))
    assert metadata["Version"] == ddpm_hf.__version__
    assert {"train", "eval", "tensorboard"} <= set(metadata.get_all("Provides-Extra"))


@pytest.mark.slow
def test_an_installed_wheel_trains_in_an_empty_folder(wheel, tmp_path):
    """The packages that ours needs are lent by this environment, by their folder alone, so that ours is the wheel's."""
    venv.create(tmp_path / "venv", with_pip=True)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("ACCELERATE_")}
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*command):
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    python = str(programs / "python")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lent = "\n".join(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    Path(packages, "lent.pth").write_text(lent)
    assert run(python, "-c", "import ddpm_hf; print(ddpm_hf.__file__)").startswith(packages)
    console = str(programs / "ddpm-hf")
    assert run(console, "--version") == f"ddpm-hf {ddpm_hf.__version__}\n"
    run(console, "train", "--config", "digits", *TINY)
    left = {path.name for path in (empty / "ddpm-digits").iterdir()}
    assert {"model_index.json", "README.md", "samples_and_real.png", "loss.png", "checkpoint-12"} <= left
