"""The harness that compares recipes, on very little time."""

import io
import json
import math
import sys

import datasets
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from support.runs import ROOT, run

SCRIPT = ROOT / "training" / "benchmarks" / "recipes.py"


def photographs(file):
    """Crops of two photographs, labelled by which of them, as CIFAR-10's parquet file has it."""
    encoded, labels = [], []
    for label, pixels in enumerate(load_sample_images().images):
        for i in range(16):
            stream = io.BytesIO()
            Image.fromarray(pixels[16 * i : 16 * i + 64, 32 * i : 32 * i + 64]).save(stream, "png")
            encoded.append({"bytes": stream.getvalue(), "path": None})
            labels.append(label)
    datasets.Dataset.from_dict({"image": encoded, "label": labels}).to_parquet(file)
    return file


DONE = {
    "set": "digits", "recipe": "base", "seed": 0, "budget": 1.0, "clock": "cpu", "seconds": 1.0, "updates": 9,
    "images_seen": 288, "frechet": 2.5, "frechet_error": 0.1, "copies": 0.0,
}  # fmt: skip


@pytest.mark.slow
def test_a_recipe_is_trained_and_measured_and_what_is_done_is_kept(tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "recipes.json").write_text(json.dumps({"digits-base-0-1s": DONE}))
    ended = run([
        sys.executable, str(SCRIPT), "--sets", "digits", "--recipes", "base", "min_snr", "--seconds", "1", "--clock",
        "cpu", "--num_images", "16", "--steps", "2", "--extractor_updates", "2", "--cifar",
        str(photographs(tmp_path / "photos.parquet")), "--output_dir", str(folder),
    ])  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    results = json.loads((folder / "recipes.json").read_text())
    assert results.pop("digits-base-0-1s") == DONE
    ((name, new),) = results.items()
    assert new["recipe"] == "min_snr"
    assert new["seconds"] >= 1
    assert new["images_seen"] == 32 * new["updates"] > 0
    assert all(math.isfinite(new[key]) for key in ("frechet", "frechet_error", "bits_per_dim"))
    assert Image.open(folder / f"{name}.png").size == (16 * 64, 64)
    table = (folder / "recipes.md").read_text()
    assert "| digits | base | 0 | 1 | 9 | 288 | 2.50 ± 0.10 |  | 0.0% |" in table
    assert "| digits | min_snr | 0 | 1 |" in table
