"""The Gradio app, in a browser."""

import importlib.util
import io
import threading

import numpy as np
import pytest
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, load_pipeline
from ddpm_hf.cli import main
from ddpm_hf.demo.live import sample_live
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
    field = page.get_by_label(name, exact=True)
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


@pytest.mark.slow
def test_a_missing_image_is_named(page):
    for tab in ("Restore", "Edit"):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name=tab, exact=True).click()
        page.get_by_text("There is no image: upload one, or draw.").first.wait_for()


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


def test_without_gradio_the_command_says_what_to_install(model, monkeypatch):
    monkeypatch.setattr("ddpm_hf.commands.demo.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'ddpm-hf\[demo\]'"):
        main(["demo", str(model)])
