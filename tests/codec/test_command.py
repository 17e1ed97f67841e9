"""`ddpm-hf compress` and `decompress`, as processes of their own."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.codec.container import unpack
from ddpm_hf.commands.codec import compress, decompress
from ddpm_hf.config.codec import CompressConfig, DecompressConfig
from support.runs import run, run_here


def test_files_come_back_in_another_process_with_other_threads(model_folder, image_files, tmp_path):
    made = tmp_path / "made.ddpm"
    folder = image_files[0].parent
    Image.open(image_files[4]).convert("1").save(folder / "line art.bmp")
    files = [*image_files, folder / "line art.bmp"]
    command = (sys.executable, "-m", "ddpm_hf")
    options = ("--steps", "4", "--batch_size", "4")
    done = run([*command, "compress", str(model_folder), *map(str, files), "-o", str(made), *options])
    for text in (
        "13 images",
        "net rate of the other",
        "bound",
        "initial bits",
        "header and checksums",
        "the network took",
    ):
        assert text in done.stdout, done.stderr
    # The file knows its model; what it is decoded with differs in its threads.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    done = run([*command, "decompress", str(made), "-o", str(tmp_path / "out")], env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f.name for f in files)
    for file in files:
        with Image.open(file) as before, Image.open(tmp_path / "out" / file.name) as after:
            assert (before.mode, before.size, before.format) == (after.mode, after.size, after.format)
            np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_a_damaged_file_ends_with_one_line(model_folder, image_files, tmp_path):
    made = compress(str(model_folder), list(map(str, image_files)), config(tmp_path, num_inference_steps=2))
    made.write_bytes(made.read_bytes()[:-100])
    done = run_here(main, ["decompress", str(made), "-o", str(tmp_path / "out")])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "ends at byte" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def config(folder, **options):
    return CompressConfig(output_file=str(folder / "made.ddpm"), **options)


def test_a_model_that_has_moved_is_passed(pipeline, model_folder, image_files, tmp_path):
    made = compress(str(model_folder), list(map(str, image_files)), config(tmp_path, num_inference_steps=2))
    away = tmp_path / "elsewhere"
    pipeline.save_pretrained(away)
    out = decompress(str(made), str(away), DecompressConfig(output_dir=str(tmp_path / "out")))
    assert len(list(out.iterdir())) == len(image_files)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"photo": "nothing.png"}, "there is no file 'nothing.png'"),
        ({"size": (9, 8)}, r"9 × 8 pixels, but the model needs 8 × 8.*--tile"),
        ({"output_file": "."}, "is a folder"),
        ({"output_file": "/dev/null/made.ddpm"}, "`output_file` '/dev/null' can't be written to"),
        ({"photo": "."}, r"'.' is a folder: pass its files, as in ./\*.png"),
        ({"class_label": "3"}, "unconditional"),
        ({"num_inference_steps": 21}, "from 1 to 20"),
        ({"variance_type": "learned"}, "predicts no variance"),
    ],
)
def test_errors_come_before_anything_is_written(model_folder, image_files, tmp_path, change, says):
    photos = [str(image_files[0]), change.pop("photo", str(image_files[1]))]
    if size := change.pop("size", None):
        Image.open(photos[1]).resize(size).save(photos[1])
    options = {"output_file": str(tmp_path / "made.ddpm"), **change}
    with pytest.raises(ValueError, match=says):
        compress(str(model_folder), photos, CompressConfig(**options))
    assert not (tmp_path / "made.ddpm").exists()


def test_an_image_is_not_replaced_by_the_file(model_folder, image_files):
    before = image_files[0].read_bytes()
    with pytest.raises(ValueError, match="is one of the images"):
        compress(str(model_folder), list(map(str, image_files)), CompressConfig(output_file=str(image_files[0])))
    assert image_files[0].read_bytes() == before


def test_the_spacing_of_the_model_is_its_own(pipeline, model_folder, image_files, tmp_path):
    photos = list(map(str, image_files))
    made = compress(str(model_folder), photos, config(tmp_path, num_inference_steps=4, timestep_spacing="model"))
    own = pipeline.scheduler_on_trajectory(4).timesteps.tolist()
    assert unpack(made.read_bytes()).header["chain"]["timesteps"] == own


def test_the_processor_of_another_machine_is_found_out(model_folder, image_files, tmp_path):
    """This processor, with fewer of its instructions: oneDNN sums in another order."""
    made = compress(str(model_folder), list(map(str, image_files)), config(tmp_path, num_inference_steps=2))
    command = [sys.executable, "-m", "ddpm_hf", "decompress", str(made), "-o", str(tmp_path / "out")]
    done = run(command, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"})
    if done.returncode == 0:
        pytest.skip("this processor's sums are those of the oldest ones")
    assert "are not those of the machine that made the file" in done.stderr
    assert "ONEDNN_MAX_CPU_ISA=SSE41" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_kind_is_refused(image_files, tmp_path):
    with pytest.raises(ValueError, match=r"starts with 89 50 4e 47 .*, but a file of `ddpm-hf compress`"):
        decompress(str(image_files[0]), None, DecompressConfig(output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="there is no file"):
        decompress(str(tmp_path / "missing"), None, DecompressConfig())


def test_without_constriction_the_remedy_is_named(model_folder, image_files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ValueError, match=r"pip install 'ddpm-hf\[codec\]'"):
        compress(str(model_folder), list(map(str, image_files)), config(tmp_path))
    assert not Path(tmp_path / "made.ddpm").exists()
