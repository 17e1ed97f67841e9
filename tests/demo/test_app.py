"""The Gradio app, in a browser."""

import importlib.util
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, edit, load_pipeline, restore
from ddpm_hf.cli import main
from ddpm_hf.demo.live import sample_live
from ddpm_hf.restoration.operators import Downsample
from support.browser import missing, nameless_controls, open_browser, watched_page
from support.models import tiny_unet

ENDED = "() => / images of .* steps in /.test(document.querySelector('#status textarea').value)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    unet = tiny_unet(num_class_embeds=3)
    unet.register_to_config(_label_names=["cats", "dogs"])
    folder = tmp_path_factory.mktemp("model")
    DDPMPipelineCustom(unet, DDPMSchedulerCustom()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model):
    if importlib.util.find_spec("gradio") is None:
        missing("no Gradio: pip install 'ddpm-hf[demo]'")
    from ddpm_hf.demo.app import launch

    app = launch(load_pipeline(str(model)), "my *model*", wait=False)
    yield app.local_url
    app.close()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(address, browser):
    with watched_page(browser) as page:
        page.goto(address)
        page.get_by_role("button", name="Sample", exact=True).wait_for()
        yield page


def set_number(page, name, value):
    field = page.get_by_label(name, exact=True).locator("visible=true")
    field.fill(str(value))
    field.press("Tab")


def begin(page, seed, button="Sample"):
    set_number(page, "Seed", seed)
    page.get_by_role("button", name=button, exact=True).click()


def images(page):
    """The images of the gallery, (N, H, W, 3)."""
    page.wait_for_function(ENDED)
    addresses = page.locator("#images .grid-wrap img").evaluate_all("all => all.map((image) => image.src)")
    return np.stack([pixels(page, address) for address in addresses])


def pixels(page, address):
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")).astype(int)


@pytest.mark.slow
def test_a_visitor_samples_what_the_command_samples_and_goes_through_the_trajectory(page, model, tmp_path):
    set_number(page, "number input for Steps", 6)
    set_number(page, "number input for Images", 3)
    begin(page, seed=7)
    found = images(page)
    options = ["--steps", "6", "--eta", "0", "--solver_order", "2", "--spacing", "trailing", "--device", "cpu"]
    options += ["--class_label", "cats", "dogs", "--seed", "7", "--num_images", "3", "--output_dir", str(tmp_path)]
    main(["sample", str(model), *options])
    expected = np.stack([np.asarray(Image.open(tmp_path / f"{i:05d}.png")).astype(int) for i in range(3)])
    assert np.abs(found - expected).max() <= 1

    last = page.locator("#view img").get_attribute("src")
    set_number(page, "number input for Trajectory: frame", 2)
    page.wait_for_function("(last) => document.querySelector('#view img').src !== last", arg=last)
    assert page.locator("#status textarea").input_value().startswith("After step 2 of 6 (t = 8")
    noisy = page.locator("#view img").get_attribute("src")
    page.get_by_label("what the network expects").check()
    page.wait_for_function("(last) => document.querySelector('#view img').src !== last", arg=noisy)

    begin(page, seed=7, button="Next seed")
    page.wait_for_function("() => document.querySelector('#images').innerText.includes('seed 10')")
    assert (images(page) != found).any()

    assert page.locator("h1").inner_text() == "my *model*"
    assert [html for html in nameless_controls(page) if not html.startswith("<svg")] == []  # icons are decoration
    page.set_viewport_size({"width": 375, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


@pytest.mark.slow
def test_two_visitors_at_once_get_their_own_images(page, address, browser):
    with watched_page(browser) as other:
        other.goto(address)
        other.get_by_role("button", name="Sample", exact=True).wait_for()
        seen = {}
        for seed, visitor in ((1, page), (2, other)):
            begin(visitor, seed)
        for seed, visitor in ((1, page), (2, other)):
            seen[seed] = images(visitor)
        assert (seen[1] != seen[2]).any()
    for seed, new in ((2, 5), (1, 1)):
        begin(page, seed)
        page.wait_for_function(f"() => document.querySelector('#images').innerText.includes('seed {new}')")
        assert (images(page) == seen[seed]).all()


def upload(page, file):
    with page.expect_response("**/run/predict"), page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Upload an image").click()
        chooser.value.set_files(file)


def results(page, gallery, press, count):
    """The images of a gallery, each (C, H, W), after pressing a button; other files than before."""
    addresses = f"[...document.querySelectorAll('#{gallery} .grid-wrap img')].map((image) => image.src)"
    before = page.evaluate(addresses)
    page.get_by_role("button", name=press, exact=True).click()
    page.wait_for_function(
        f"([b, n]) => {addresses}.filter((src) => !b.includes(src)).length === n", arg=[before, count]
    )
    return [pixels(page, address).transpose(2, 0, 1) for address in page.evaluate(addresses)]


@pytest.mark.slow
def test_an_image_is_restored_and_edited_as_in_python(page, model, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    x = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    pipeline, labels = load_pipeline(str(model)), [0, 1]
    options = {"num_inference_steps": 5, "class_labels": labels}

    def generators(seed):
        return [torch.Generator().manual_seed(seed + i) for i in range(2)]

    page.get_by_role("tab", name="Restore").click()
    page.get_by_role("button", name="Restore", exact=True).click()
    page.get_by_text("There is no image: upload one, or draw.").wait_for()
    upload(page, tmp_path / "photo.png")  # the canvas has hardly started
    page.get_by_label("2 times too small").check()
    set_number(page, "number input for Steps", 5)
    small, *found = results(page, "restored", "Restore", 3)
    y = Downsample(2)(x)
    expected = restore(pipeline, y.repeat(2, 1, 1, 1), Downsample(2), generator=generators(0), **options).images
    assert np.abs(small - y[0].numpy() * 255).max() <= 1
    assert np.abs(found - expected.numpy() * 255).max() <= 1
    assert (results(page, "restored", "Restore", 3)[1] == found[0]).all()

    page.get_by_label("painted over").check()
    page.get_by_role("button", name="Restore", exact=True).click()
    page.get_by_text("Nothing is painted over").wait_for()
    page.locator("#restore-image").get_by_label("Brush", exact=True).click()
    box = page.locator("#restore-image canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.up()
    known, *restored = results(page, "restored", "Restore", 3)
    kept = (known > 0).any(0)
    assert 0 < kept.sum() < kept.size
    for image in restored:
        assert np.abs(image - photo.transpose(2, 0, 1))[:, kept].max() <= 1
    assert np.abs(restored[0] - restored[1])[:, ~kept].max() > 10

    page.get_by_role("tab", name="Edit").click()
    upload(page, tmp_path / "photo.png")
    set_number(page, "number input for Steps", 5)
    found = results(page, "edited", "Edit", 2)
    expected = edit(pipeline, x.repeat(2, 1, 1, 1), 0.5, generator=generators(0), **options).images
    assert np.abs(found - expected.numpy() * 255).max() <= 1


def test_a_file_that_is_no_image_is_named_and_odd_channels_are_shown(address, tmp_path):
    from gradio import Error

    from ddpm_hf.demo import app

    (tmp_path / "words.png").write_text("no image")
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    for name, reason in (("words", "cannot identify"), ("deep", "more than 8 bits per channel")):
        with pytest.raises(Error, match=f"This image can't be used: .*{reason}"):
            app._opened(str(tmp_path / f"{name}.png"))
    for channels, mode in ((1, "L"), (2, "L"), (3, "RGB"), (4, "L")):
        (image,) = app._visible(torch.zeros(1, channels, 8, 8, dtype=torch.uint8))
        assert image.mode == mode


def test_an_image_that_is_shown_again_does_not_overwrite_the_file_that_somebody_loads(address, tmp_path):
    """Gradio names files by their content."""
    from gradio.processing_utils import save_pil_to_cache

    from ddpm_hf.demo import app

    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    shown = [
        lambda: app._grid(image),
        lambda: app._captioned([Image.new("L", (8, 8))], 0)[0][0],
    ]
    for show in shown:
        files = {save_pil_to_cache(show(), str(tmp_path), format="png") for _ in range(3)}
        assert len(files) == 3


def test_sampling_ends_when_nobody_watches_and_errors_reach_the_visitor(make_unet):
    pipeline = DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom())
    steps = sample_live(pipeline, 0, 1, pipeline.scheduler, num_inference_steps=1000)
    assert next(steps)[0].number == 1
    steps.close()
    assert "sample_live" not in {thread.name for thread in threading.enumerate()}
    frames = [f for new in sample_live(pipeline, 0, 2, pipeline.scheduler, num_inference_steps=120) for f in new]
    assert [f.number for f in frames] == [*range(1, 121, 3), 120]
    with pytest.raises(ValueError, match="class_labels"):
        list(sample_live(pipeline, 0, 1, pipeline.scheduler, num_inference_steps=5, class_labels=[0]))
    assert "sample_live" not in {thread.name for thread in threading.enumerate()}


def test_options_of_a_page_are_refused_for_an_app(model):
    for option, value in (("--dtype", "float16"), ("--output_dir", "page")):
        with pytest.raises(SystemExit, match=f"is '{value}', but only a page has one: add --static"):
            main(["demo", str(model), option, value])


def test_without_gradio_the_command_says_what_to_install(model, monkeypatch):
    monkeypatch.setattr("ddpm_hf.commands.demo.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'ddpm-hf\[demo\]'"):
        main(["demo", str(model)])
