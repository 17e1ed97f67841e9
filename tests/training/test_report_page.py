"""The page of a run: it reads well in a real browser, holds all it needs, and is continued by a resumed run."""

import json
import re
import shutil
from pathlib import Path

import pytest

from ddpm_hf.diffusion.ddpm_repository import REAL_IMAGES, SHARED_FILES
from ddpm_hf.training import loop
from ddpm_hf.training.report_page import Contents, render
from ddpm_hf.training.trouble import Trouble
from support.browser import open_browser, watched_page
from support.runs import train_here

OPTIONS = ["--eval_steps", "6", "--eval_images", "16", "--num_epochs", "1"]
HEADINGS = [
    "Samples", "What is being trained", "The same samples over time", "Nearest training images",
    "Held-out images", "Loss and learning rate",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "my-digits"
    done = train_here(folder, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert f"  report    {folder / 'report.html'}\n" in done.stdout
    return folder


@pytest.fixture(scope="module")
def browser():
    with open_browser("--disable-gpu", "--disable-background-networking") as browser:
        yield browser


def updates_shown(page):
    return [int(n) for n in re.findall(r'alt="Samples after update (\d+)"', page)]


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_reads_on_a_phone_and_a_desktop_in_light_and_dark(run_folder, browser, width, scheme):
    with watched_page(browser, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto((run_folder / "report.html").as_uri())
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("h1").all_inner_texts() == ["Training my-digits"]
        assert page.locator("h2").all_inner_texts() == HEADINGS
        assert page.locator("img").count() == len(updates_shown((run_folder / "report.html").read_text())) + 3
        assert page.evaluate("[...document.images].every(i => i.alt.trim() && i.complete && i.naturalWidth)")
        assert page.evaluate("[...document.querySelectorAll('svg')].every(s => s.getAttribute('aria-label'))")
        assert page.locator("svg").count() >= 4
        body = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (body == "rgb(255, 255, 255)") == (scheme == "light")
        small = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
        assert min(page.evaluate(small)) > 10  # pixels


def test_the_page_says_what_is_trained_how_far_it_is_and_what_copies(run_folder):
    page = (run_folder / "report.html").read_text("utf-8")
    assert "Done: 12 updates." in page
    assert "http-equiv" not in page  # nothing more is to come
    assert "images like those of scikit-learn digits: 1,781 images, at 16×16 pixels, in shades of grey" in page
    assert updates_shown(page) == [1, 6, 12]
    assert re.search(r"\d of 16 samples copy a training image; of as many held-out images, \d do\.", page)
    assert "<script" not in page


def test_an_interrupted_page_is_continued_with_the_samples_and_losses_of_before(run_folder, tmp_path):
    """What a run that was killed has left: its checkpoint, its log, and samples of a future that is not repeated."""
    folder = shutil.copytree(run_folder, tmp_path / "my-digits")
    (folder / "report.html").write_text("cut off")
    (folder / "logs" / "plan.json").write_text(
        json.dumps([["expect", "clear digits"], ["held out", "16 of them"], ["output", "/home/me"]])
    )
    for name in ("test_samples-12.png", "test_samples_raw-12.png"):
        (folder / "logs" / name).unlink()
    shutil.copyfile(folder / "logs" / "test_samples-6.png", folder / "logs" / "test_samples-99.png")
    shutil.copyfile(folder / "logs" / "test_samples-6.png", folder / "logs" / "test_samples-of-mine.png")
    done = train_here(folder, *OPTIONS, "--resume_from_checkpoint", "checkpoint-8")
    assert done.returncode == 0, done.stderr
    before, after = ((f / "report.html").read_text("utf-8") for f in (run_folder, folder))
    assert updates_shown(after) == [1, 6, 12]
    for name, text in (("Expect", "clear digits"), ("Held out", "16 of them")):
        assert f'<th scope="row">{name}</th><td>{text}</td>' in after
    assert after.count(">Held out<") == 1
    assert "/home/me" not in after  # no path of this machine on a page that may be shared
    charts = [re.findall(r"<polyline[^>]*>", page) for page in (before, after)]
    assert charts[0] == charts[1] != []


def test_what_goes_wrong_with_the_page_is_said_once_and_ends_no_run(tmp_path):
    (tmp_path / "report.html").mkdir()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train.jsonl").touch()
    (tmp_path / "logs" / "plan.json").write_text("[[1, 2, 3]]")
    (tmp_path / "logs" / "test_samples-0.png").write_text("no picture")
    done = train_here(tmp_path, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("report.html is not up to date") == 1
    assert "Training continues." in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "words"),
    [(ValueError("no memory"), "Failed after 12.*no memory"), (KeyboardInterrupt(), "Interrupted")],
)
def test_the_page_of_a_run_that_fails_after_its_last_update_says_so(error, words, tmp_path, monkeypatch):
    def fail(*_):
        assert "All 12 updates are done" in (tmp_path / "report.html").read_text("utf-8")
        raise error

    monkeypatch.setattr(loop, "calibrate_export", fail)
    assert train_here(tmp_path).returncode != 0
    page = (tmp_path / "report.html").read_text("utf-8")
    assert re.search(words, page)
    assert "http-equiv" not in page  # nothing more is to come


def test_a_page_of_real_images_is_uploaded_only_with_those(run_folder):
    assert "report.html" in REAL_IMAGES
    assert not any(Path("report.html").match(pattern) for pattern in SHARED_FILES)


def test_noise_is_normal_early_and_nothing_stands_above_the_samples_where_nothing_is_wrong():
    sure = {"samples": b"", "real": b""}
    early, late, done = (
        render(Contents("Run", "", is_running, share, [], [], **sure))
        for is_running, share in ((True, 0.1), (True, 0.8), (False, 1.0))
    )
    assert "after 10% of the training: noise and blots are normal so early" in early
    assert "after 80% of the training<" in late
    assert "Drawn by the network<" in done
    assert not any("Warnings" in page for page in (early, late, done))
    trouble = Trouble("stuck", "It is stuck", "at 1", "Lower it.")
    assert "Warnings" in render(Contents("Run", "", True, 0.1, [], [], [(3, trouble)], **sure))


def test_a_page_without_a_best_checkpoint_marks_none():
    """As on a machine that resumes with another's checkpoint."""
    entries = [{"step": step, "eval_bits_per_dim": 5.0 / step} for step in (3, 6)]
    pages = [
        render(Contents("Run", "Running.", True, 0.5, [], [], entries=entries, best=best, metric="bits_per_dim"))
        for best in (None, 3)
    ]
    assert ["The green line marks" in page for page in pages] == [False, True]
