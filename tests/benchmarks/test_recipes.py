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


@pytest.mark.slow
def test_recipes_are_trained_and_measured_and_a_second_call_does_the_rest(tmp_path):
    command = [
        sys.executable, str(SCRIPT), "--sets", "digits", "--seconds", "1", "--clock", "cpu", "--num_images", "16",
        "--steps", "2", "--extractor_updates", "2", "--cifar", str(photographs(tmp_path / "photos.parquet")),
        "--output_dir", str(tmp_path / "bench"),
    ]  # fmt: skip
    run([*command, "--recipes", "base"])
    first = json.loads((tmp_path / "bench" / "recipes.json").read_text())
    run([*command, "--recipes", "base", "min_snr"])
    results = json.loads((tmp_path / "bench" / "recipes.json").read_text())
    assert [r["recipe"] for r in results.values()] == ["base", "min_snr"]
    assert first.items() < results.items()
    for name, r in results.items():
        assert r["seconds"] >= 1
        assert r["images_seen"] == 32 * r["updates"] > 0
        assert all(math.isfinite(r[key]) for key in ("frechet", "frechet_error", "bits_per_dim"))
        assert Image.open(tmp_path / "bench" / f"{name}.png").size == (16 * 64, 64)
    table = (tmp_path / "bench" / "recipes.md").read_text()
    assert all(f"| digits | {name} | 0 | 1 |" in table for name in ("base", "min_snr"))
