"""Results on disk: those of version 0.1.0 are read, and no model but the measured one is touched."""

import json
import shutil
from pathlib import Path

import pytest

from ddpm_hf.evaluation.results import choose_output_dir, markdown_table, read_results, write_results
from support.evaluation import save_model

EARLIER = Path(__file__).parents[1] / "fixtures" / "version_0_1_0" / "metrics.json"
TITLES = [
    "bits/dim, K = 20, σ² fixed_small, N = 12",
    "Fréchet distance, K = 3, leading, σ² fixed_small, N = 24, extractor [13f61c]",
    "share near training images (0.05 for new ones), K = 3, leading, σ² fixed_small, N = 24, held out test, "
    "extractor [13f61c]",
    "bits/dim, K = 20, σ² fixed_small, N = 20, 4 calls per image",
]


def test_results_of_version_0_1_0_keep_their_titles_and_numbers(tmp_path):
    results, stored = read_results(EARLIER), json.loads(EARLIER.read_text("utf-8"))["figures"]
    assert [r.title for r in results] == TITLES
    assert [r.value for r in results] == [figure["value"] for figure in stored]
    entry = results[1].for_card()
    assert (entry.dataset_name, entry.dataset_split, entry.metric_type) == ("scikit-learn digits", "train", "fd")
    assert entry.metric_name == TITLES[1]
    assert entry.metric_args["95 % interval"] == [0.348, 0.549]
    assert entry.metric_args["ddpm-hf"] == "0.1.0"
    write_results(tmp_path / "metrics.json", results)
    assert read_results(tmp_path / "metrics.json") == results
    assert "metrics.json.partial" not in {file.name for file in tmp_path.iterdir()}


def test_results_are_readable_in_a_notebook():
    bpd, fd, *_ = read_results(EARLIER)
    assert str(bpd) == f"{TITLES[0]}: 10.71 ± 0.12 (N = 12)"
    assert str(fd).startswith(f"{TITLES[1]}: 0.4486 (N = 24, 95 %: 0.3483 to 0.549, of which about ")
    assert "settings" not in repr(bpd)
    rows = markdown_table([bpd, fd]).splitlines()
    assert f"| unseen, test | {TITLES[0]} | 10.71 | ± 0.12 |  |" in rows
    assert rows[-1].startswith("1. N = 24 raises it")


def test_results_are_added_to_a_saved_pipeline_but_to_no_checkpoint_or_other_model(make_unet, tmp_path):
    model = save_model(make_unet(channels=1), tmp_path / "model")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(model, checkpoint)
    (checkpoint / "manifest.json").write_text("{}")
    for folder in (None, str(model), f"{model}/../model"):
        assert choose_output_dir(str(model), folder).samefile(model)
    new = tmp_path / "new"
    for name in (model, checkpoint, "google/ddpm-cifar10-32"):
        assert choose_output_dir(str(name), str(new)) == new
    for name, folder in (
        (checkpoint, None), (checkpoint, str(checkpoint)), ("google/ddpm-cifar10-32", None), (tmp_path / "gone", None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="--output_dir FOLDER"):
            choose_output_dir(str(name), folder)
    with pytest.raises(ValueError, match="output_dir.*holds another model"):
        choose_output_dir(str(model), str(checkpoint))
