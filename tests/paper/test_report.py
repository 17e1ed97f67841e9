"""`ddpm-hf paper`: every figure of a small model on one page; no figure is drawn twice; errors come first."""

import json
import re
from importlib import import_module

import pytest
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.paper.report import FIGURES
from support.evaluation import save_model
from support.models import tiny_unet

SMALL = ["--num_images", "6", "--num_likelihood_images", "4", "--steps", "5", "--batch_size", "4"]
DIGITS = ["--dataset", "digits"]
DRAWN = [figure for figure in FIGURES if not figure.is_optional]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_model(tiny_unet(channels=1), tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    main(["paper", model, *DIGITS, *SMALL, "--output_dir", str(folder)])
    return folder


def record(folder):
    return json.loads((folder / "paper.json").read_text("utf-8"))


def test_the_page_holds_every_figure_and_needs_nothing_else(report):
    page = (report / "index.html").read_text("utf-8")
    for figure in DRAWN:
        assert f'id="{figure.name}"' in page
        if figure.has_picture:
            with Image.open(report / f"{figure.name}.png") as picture:
                assert min(picture.size) > 100
    assert page.count("data:image/png;base64,") == sum(figure.has_picture for figure in DRAWN)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "{" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)  # every number has been filled in
    assert "Left out" not in page


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_a_figure_is_explained_in_three_sentences_and_its_functions_exist(figure):
    sentences = re.split(r"(?<!Eq)\.\s+(?=[A-Z{`])", figure.text)
    assert len(sentences) == 3, sentences
    for name in figure.functions:
        name = name.split(" ")[0]
        path = name.split(".")
        depth = next(n for n in range(len(path), 0, -1) if _is_module(".".join(path[:n])))
        thing = import_module(".".join(path[:depth]))
        for part in path[depth:]:
            thing = getattr(thing, part)
        assert callable(thing)


def _is_module(name):
    try:
        import_module(name)
    except ImportError:
        return False
    return True


def test_a_second_run_draws_nothing_and_other_options_redraw_what_depends_on_them(model, report, capsys):
    before = {f.name: (report / f"{f.name}.png").stat().st_mtime_ns for f in DRAWN if f.has_picture}
    page = (report / "index.html").read_text("utf-8")
    main(["paper", model, *DIGITS, *SMALL, "--output_dir", str(report)])
    assert {name: (report / f"{name}.png").stat().st_mtime_ns for name in before} == before
    assert (report / "index.html").read_text("utf-8") == page
    assert "0 figures to draw, 16 kept" in capsys.readouterr().out

    main(["paper", model, *DIGITS, *SMALL, "--num_likelihood_images", "5", "--output_dir", str(report)])
    changed = {n for n, time in before.items() if (report / f"{n}.png").stat().st_mtime_ns != time}
    assert changed == {"rate_distortion"}
    assert record(report)["rate_distortion"]["numbers"]["count"] == 5


def test_samples_of_an_interrupted_run_are_reused(model, report, tmp_path):
    """A report from one of two batches of samples, whose work was cut off, ends with the same picture."""
    again = tmp_path / "again"
    options = [*DIGITS, *SMALL, "--figures", "progressive", "--output_dir", str(again)]
    main(["paper", model, *options])
    expected = (again / "progressive.png").read_bytes()
    (kept, lost) = sorted(again.glob("work/samples-*/*.npz"))
    lost.unlink()
    (again / "progressive.png").unlink()
    time = kept.stat().st_mtime_ns
    main(["paper", model, *options])
    assert kept.stat().st_mtime_ns == time
    assert lost.is_file()
    assert (again / "progressive.png").read_bytes() == expected == (report / "progressive.png").read_bytes()


def test_without_images_the_figures_that_need_none_are_drawn_from_samples(model, tmp_path):
    main(["paper", model, *SMALL, "--output_dir", str(tmp_path)])
    page = (tmp_path / "index.html").read_text("utf-8")
    for figure in DRAWN:
        assert (f'id="{figure.name}"' in page) == (not figure.needs_images)
        if figure.needs_images:
            assert f"{figure.title}: needs real images" in page


def test_a_model_with_classes_is_drawn_with_the_classes_of_its_images(tmp_path):
    model = save_model(tiny_unet(channels=1, num_class_embeds=11), tmp_path / "model")
    with pytest.raises(SystemExit, match="conditional on 11 classes.*--label_column label"):
        main(["paper", str(model), *DIGITS, *SMALL, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    options = [*DIGITS, "--label_column", "label", *SMALL, "--figures", "samples,shared,interpolation,rate_distortion"]
    main(["paper", str(model), *options, "--output_dir", str(tmp_path / "out")])
    assert set(record(tmp_path / "out")) == {"samples", "shared", "interpolation", "rate_distortion"}


def test_the_strip_of_a_colour_model_of_300_steps(tmp_path):
    """A model of the preset `colour64_t300`, in small."""
    for name in "abcd":
        Image.effect_noise((20, 20), 60).convert("RGB").save(tmp_path / f"{name}.png")
    unet = {
        "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 2, "add_attention": False,
        "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
    }  # fmt: skip
    small = {
        "train_data_dir": tmp_path, "resolution": 16, "unet": json.dumps(unet), "max_train_steps": 2,
        "train_batch_size": 2, "lr_warmup_steps": 0, "eval_batch_size": 1, "ddpm_num_inference_steps": 2,
        "calibration_images": 0, "report_to": "none", "output_dir": tmp_path / "model",
    }  # fmt: skip
    main(["train", "--config", "colour64_t300", *(str(v) for k, o in small.items() for v in (f"--{k}", o))])
    options = ["--figures", "sampling_strip", "--num_images", "2", "--steps", "30"]
    main(["paper", str(tmp_path / "model"), *options, "--output_dir", str(tmp_path / "out")])
    assert "T = 300<" in (tmp_path / "out" / "index.html").read_text("utf-8")
    with Image.open(tmp_path / "out" / "sampling_strip.png") as picture:
        assert len({band.tobytes() for band in picture.convert("RGB").split()}) == 3


@pytest.mark.slow
def test_six_networks_are_trained_once_and_compared(model, tmp_path):
    options = [*DIGITS, *SMALL, "--figures", "ablation", "--ablation_updates", "2", "--output_dir", str(tmp_path)]
    main(["paper", model, *options])
    head, *rows = record(tmp_path)["ablation"]["table"]
    assert len({tuple(row[:3]) for row in rows}) == 6
    assert all(float(row[3].split(" ")[0]) > 0 and float(row[4]) > 0 for row in rows)
    networks = sorted(tmp_path.glob("work/ablation-*/*/model_index.json"))
    times = [file.stat().st_mtime_ns for file in networks]
    assert len(times) == 6
    (tmp_path / "paper.json").unlink()
    main(["paper", model, *options])
    assert [file.stat().st_mtime_ns for file in networks] == times
    assert record(tmp_path)["ablation"]["table"] == [head, *rows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--figures", "samples,fig99"], "`figures` has 'fig99', but must be of samples,schedule"),
        (["--steps", "21"], "`num_inference_steps` is 21, but the model has T = 20"),
        (["--num_images", "1"], "`num_images` is 1, but must be at least 2"),
        (["--test_split", "test"], "unseen images were named, but no training images"),
        (["--dataset", "digits", "--train_data_dir", "x"], "both name training images"),
        (["--dataset", "digits", "--feature_extractor", "nowhere/at-all"], "nowhere/at-all"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(model, options, message, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=message):
        main(["paper", model, *options, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
