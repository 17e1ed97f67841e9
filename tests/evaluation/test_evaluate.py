"""`ddpm-hf evaluate`: results are those of its parts, measured once, and in the card as the Hub wants them."""

import json
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from huggingface_hub import ModelCard
from PIL import Image

import ddpm_hf
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.cli import main
from ddpm_hf.config.commands import EvaluateConfig
from ddpm_hf.evaluation.likelihood import bits_per_dim, rate_distortion
from ddpm_hf.evaluation.metrics.distances import frechet_distance, moments, precision_recall
from ddpm_hf.evaluation.metrics.features import open_extractor
from ddpm_hf.evaluation.metrics.memorization import memorization, nearest_neighbours
from ddpm_hf.evaluation.real_images import load_real_images
from ddpm_hf.evaluation.results import read_results
from ddpm_hf.sharing.card import CardFacts, write_card
from support.card_rules import card_errors
from support.evaluation import QUICK, save_extractor, save_model, save_noise, stored_results

METRICS = ["bpd", "fd", "kd", "precision", "recall", "nearest", "nearest"]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr("ddpm_hf.evaluation.metrics.reference_statistics.HF_HOME", str(tmp_path / "hf"))


@pytest.fixture(scope="module")
def extractor(tmp_path_factory):
    return save_extractor(tmp_path_factory.mktemp("extractor"))


@pytest.fixture
def model(make_unet, tmp_path):
    """The folder of an untrained model of 8×8 grayscale images."""
    return save_model(make_unet(channels=1), tmp_path / "model")


def digits(unet):
    return load_real_images(unet, EvaluateConfig(dataset_name="digits"), show_progress=False)[0].pixels


# --- the results ---------------------------------------------------------------------------------------------------


def test_the_likelihood_is_that_of_bits_per_dim(model):
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--seed", "3"])
    pipe = DDPMPipelineCustom.from_pretrained(model)
    pixels = digits(pipe.unet)
    bits = bits_per_dim(pipe, pixels, num_images=20, seed=3, batch_size=8, show_progress=False)
    (result,) = stored_results(model)
    assert result["value"] == pytest.approx(bits.total, rel=1e-9)
    assert result["standard_error"] == pytest.approx(bits.standard_error, rel=1e-9)
    assert result["details"]["L_T"] == pytest.approx(bits.L_T, rel=1e-9)
    assert result["details"]["rate"] + result["details"]["L_0"] == pytest.approx(bits.total, rel=1e-9)
    tables = json.loads((model / "likelihood.json").read_text("utf-8"))
    assert tables["timesteps"] == list(range(19, -1, -1))
    assert tables["bits_per_dim"] == pytest.approx(bits.terms.tolist(), rel=1e-5)
    assert tables["rate"] == pytest.approx(rate_distortion(bits).rate.tolist(), rel=1e-5)
    assert tables["distortion_rmse"] == pytest.approx(rate_distortion(bits).distortion.tolist(), rel=1e-5)
    for picture in ("bits_per_dim.png", "rate_distortion.png"):
        assert Image.open(model / picture).size > (300, 300)


def test_evaluate_returns_the_results_and_leaves_the_pipeline_unchanged(model, tmp_path):
    pipe, options = ddpm_hf.load_pipeline(str(model)), {"dataset_name": "digits", "metrics": "bpd,nearest"}
    scheduler, weights = pipe.scheduler, {name: w.clone() for name, w in pipe.unet.state_dict().items()}
    config = EvaluateConfig(
        **options, output_dir=str(tmp_path / "out"), num_images=12, num_inference_steps=3, num_likelihood_images=10,
        likelihood_steps=4, dtype="bfloat16", timestep_spacing="trailing", variance_type="fixed_large",
    )  # fmt: skip
    bpd, nearest = results = ddpm_hf.evaluate(pipe, config)
    assert read_results(tmp_path / "out" / "metrics.json") == results
    assert bpd.title == "bits/dim, K = 4, trailing, σ² fixed_large, N = 10, bfloat16"
    assert (nearest.metric, nearest.num_images, nearest.num_reference) == ("nearest", 12, 1797)
    assert pipe.scheduler is scheduler
    assert all(torch.equal(w, weights[name]) for name, w in pipe.unet.state_dict().items())
    expected = DDPMPipelineCustom(
        pipe.unet.bfloat16(), DDPMSchedulerCustom.from_config(scheduler.config, variance_type="fixed_large")
    )
    bits = bits_per_dim(
        expected, digits(pipe.unet), num_images=10, num_inference_steps=4, timesteps="trailing", show_progress=False
    )
    assert bpd.value == pytest.approx(bits.total, rel=1e-9)
    with pytest.raises(ValueError, match="output_dir.*not set"):
        ddpm_hf.evaluate(pipe, EvaluateConfig(**options))


def test_an_estimate_states_its_calls(model):
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--calls_per_image", "4"])
    pipe = DDPMPipelineCustom.from_pretrained(model)
    bits = bits_per_dim(pipe, digits(pipe.unet), num_images=20, batch_size=8, calls_per_image=4, show_progress=False)
    (result,) = stored_results(model)
    assert result["value"] == pytest.approx(bits.total, rel=1e-9)
    assert result["settings"]["calls_per_image"] == result["details"]["calls_per_image"] == 4


def test_results_of_samples_are_those_of_the_stored_files(model, extractor):
    main(["evaluate", str(model), *QUICK, "--feature_extractor", str(extractor), "--metrics", "fd,kd,prc,nearest"])
    (file,) = model.glob("evaluation/samples-*/samples.npz")
    samples = torch.from_numpy(np.load(file)["arr_0"]).permute(0, 3, 1, 2)
    pipe = DDPMPipelineCustom.from_pretrained(model)
    again = pipe(24, [torch.Generator().manual_seed(i) for i in range(24)], num_inference_steps=3, output_type="pt")
    assert (samples.float() - again.images * 255).abs().max() < 1.5
    real, extract = digits(pipe.unet), open_extractor(str(extractor))
    x, y = (extract(pixels, show_progress=False).pooled for pixels in (samples, real))
    to_train = nearest_neighbours(samples, real, 1, show_progress=False).distances[:, 0]
    to_others = nearest_neighbours(real, real, 1, exclude=torch.arange(len(real)), show_progress=False).distances[:, 0]
    nearest = memorization(to_train, to_others)
    expected = {
        "fd": frechet_distance(moments(x), moments(y)),
        "precision": precision_recall(x, y)[0],
        "recall": precision_recall(x, y)[1],
        "nearest": nearest.share,
    }
    found = {f["metric"]: f for f in reversed(stored_results(model))}
    for name, value in expected.items():
        assert found[name]["value"] == pytest.approx(value, rel=1e-5, abs=1e-9), name
    for result in found.values():
        assert result["num_images"] == 24
        assert result["num_reference"] == 1797
        assert result["settings"]["chain"]["num_inference_steps"] == 3
    in_pixels = next(f for f in stored_results(model) if f["metric"] == "nearest")
    assert in_pixels["details"]["threshold"] == pytest.approx(nearest.threshold)
    assert in_pixels["details"]["median"] == pytest.approx(float(to_train.median()))
    assert "resnet" in found["fd"]["settings"]["extractor"].lower()


def test_a_model_that_reproduces_its_training_images_is_detected(make_unet, tmp_path):
    """Measured against a handful of training images and unseen ones of the same kind."""
    for kind, seed in (("train", 0), ("unseen", 1)):
        save_noise(tmp_path / kind, 40, seed)
    model = save_model(make_unet(channels=1), tmp_path / "model")
    command = ["evaluate", str(model), "--train_data_dir", str(tmp_path / "train"), "--test_data_dir",
               str(tmp_path / "unseen"), "--metrics", "nearest", "--num_images", "16", "--steps", "2"]  # fmt: skip
    command += ["--cache_dir", str(tmp_path / "cache")]
    main(command)
    (file,) = model.glob("evaluation/samples-*/samples.npz")
    train = np.stack([np.asarray(Image.open(tmp_path / "train" / f"{i}.png")) for i in range(16)])[..., None]
    np.savez(file, arr_0=train ^ 1)  # what a model that has memorized them would make
    (model / "metrics.json").unlink()
    main(command)
    (result,) = stored_results(model)
    assert result["value"] == 1
    assert result["settings"]["held_out"]["split"] == "test"


def test_unseen_images_are_measured_on_where_there_are_any(model, extractor, tmp_path):
    for split, shade in (("train", 0), ("test", 200)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(np.full((8, 8), shade + i, np.uint8)).save(tmp_path / "data" / split / f"{i}.png")
    data = ["--dataset", str(tmp_path / "data"), "--test_split", "test", "--cache_dir", str(tmp_path / "cache")]
    main(["evaluate", str(model), *QUICK[2:], *data, "--feature_extractor", str(extractor), "--metrics", "bpd,fd"])
    bpd, *distances = stored_results(model)
    assert bpd["settings"]["data"]["split"] == "test"
    assert bpd["num_images"] == 12
    pipe = DDPMPipelineCustom.from_pretrained(model)
    test = torch.stack([torch.full((1, 8, 8), 200 + i, dtype=torch.uint8) for i in (0, 1, 10, 11, *range(2, 10))])
    assert bpd["value"] == pytest.approx(bits_per_dim(pipe, test, show_progress=False).total, rel=1e-4)
    assert [f["settings"]["data"]["split"] for f in distances] == ["train", "test"]
    assert distances[0]["value"] != distances[1]["value"]


def test_a_class_conditional_model_is_measured_with_labels(make_unet, tmp_path):
    model = save_model(make_unet(channels=1, num_class_embeds=11), tmp_path / "model")
    main(["evaluate", str(model), *QUICK, "--label_column", "label", "--metrics", "bpd,nearest"])
    nearest = stored_results(model)[1]
    assert nearest["settings"]["chain"]["class_labels"] == list(range(10))
    (file,) = model.glob("evaluation/samples-*/samples.npz")
    assert np.load(file)["arr_1"].tolist() == [i % 10 for i in range(24)]


# --- once, and only once -------------------------------------------------------------------------------------------


def test_finished_results_are_not_measured_again(model, extractor):
    command = ["evaluate", str(model), *QUICK, "--feature_extractor", str(extractor)]
    main(command)
    first = stored_results(model)
    assert [f["metric"] for f in first] == METRICS
    shutil.rmtree(model / "evaluation")
    for picture in model.glob("*.png"):
        picture.unlink()
    main([*command, "--metrics", "bpd"])
    assert stored_results(model) == first
    assert not list(model.glob("evaluation/likelihood-*"))
    main([*command, "--metrics", "bpd", "--likelihood_steps", "5"])
    assert [f["metric"] for f in stored_results(model)] == [*METRICS, "bpd"]
    main([*command, "--metrics", "nearest", "--num_images", "10"])
    main([*command, "--metrics", "nearest", "--num_images", "5"])  # of the ten that are there
    assert [f["num_images"] for f in stored_results(model) if f["metric"] == "nearest"] == [24, 24, 10, 10, 5, 5]


def test_a_quick_look_does_not_replace_a_published_result(model):
    """Results that are not comparable stand side by side, in the card as well; another seed replaces a result."""
    command = ["evaluate", str(model), *QUICK, "--metrics", "bpd,nearest"]
    main(command)
    (published, *_) = stored_results(model)
    others = (
        ["--num_likelihood_images", "10"], ["--calls_per_image", "4"], ["--likelihood_steps", "5"],
        ["--dtype", "bfloat16"], ["--variance_type", "fixed_large"],
        ["--spacing", "trailing", "--likelihood_steps", "5"],
    )  # fmt: skip
    for options in others:
        main([*command, *options, "--metrics", "bpd"])
    for options in (["--num_images", "9"], ["--eta", "0"], ["--solver_order", "2"], ["--spacing", "trailing"]):
        main([*command, *options, "--metrics", "nearest"])
    found = stored_results(model)
    assert [f["metric"] for f in found] == ["bpd", "nearest", *["bpd"] * 6, *["nearest"] * 4]
    assert found[0] == published
    assert "bfloat16" in {f["settings"]["chain"]["dtype"] for f in found}
    text = (model / "README.md").read_text("utf-8")
    results = ModelCard(text).data.eval_results
    assert len({r.metric_name for r in results}) == len(results) == len(found)
    main([*command, "--metrics", "bpd", "--seed", "1"])
    assert len(stored_results(model)) == len(found)
    assert published not in stored_results(model)


def test_results_on_unseen_images_do_not_replace_those_on_training_images(model, tmp_path):
    folder = save_noise(tmp_path / "unseen", 12, seed=0)
    command = ["evaluate", str(model), *QUICK, "--metrics", "bpd,nearest"]
    main(command)
    main([*command, "--test_data_dir", str(folder), "--cache_dir", str(tmp_path / "cache")])
    assert [f["metric"] for f in stored_results(model)] == ["bpd", "nearest"] * 2


def test_results_of_other_weights_are_dropped(model, make_unet):
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd"])
    old = stored_results(model)[0]["value"]
    unet = make_unet(channels=1)
    torch.nn.init.constant_(unet.conv_out.bias, 0.5)
    save_model(unet, model)
    assert "Evaluation" not in (model / "README.md").read_text("utf-8")
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--likelihood_steps", "4"])
    (result,) = stored_results(model)
    assert result["value"] != old


# --- the card ------------------------------------------------------------------------------------------------------


def test_the_card_has_the_results_as_the_hub_wants_them(model, extractor):
    from huggingface_hub import EvalResult

    foreign = EvalResult("unconditional-image-generation", "mnist", "MNIST", "fid", 7.5)
    write_card(model, CardFacts(results=[foreign], options={"use_ema": True}))
    main(["evaluate", str(model), *QUICK, "--feature_extractor", str(extractor)])
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--num_likelihood_images", "10"])
    text = (model / "README.md").read_text("utf-8")
    assert card_errors(text) == []
    results = ModelCard(text).data.eval_results
    assert sorted(r.metric_type for r in results) == sorted(["fid", "bpd", *METRICS])
    bpd, stored = (next(r for r in results if "N = 10" in (r.metric_name or "")), stored_results(model)[-1])
    assert bpd.metric_value == pytest.approx(stored["value"], rel=1e-3)
    assert bpd.metric_args["images"] == 10
    assert bpd.metric_args["ema"] is True
    assert bpd.metric_args["dtype"] == "float32"
    assert bpd.metric_args["torch"] == version("torch")
    fd = next(r for r in results if r.metric_type == "fd")
    assert (
        fd.metric_args["extractor"]
        == next(f for f in stored_results(model) if f["metric"] == "fd")["settings"]["extractor"]
    )
    assert "N = 24 raises it" in next(r for r in results if r.metric_type == "fd").metric_args["notes"]
    assert (bpd.dataset_name, bpd.dataset_split) == ("scikit-learn digits", "train")
    for words in (
        "bits/dim, K = 20",
        "Fréchet distance, K = 3",
        "images 24",
        "MNIST",
        "(nearest.png)",
        "(bits_per_dim",
    ):
        assert words in text
    assert str(model) not in text


def test_no_update_card_leaves_the_card_unchanged(model, tmp_path):
    before = (model / "README.md").read_bytes()
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--no_update_card"])
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--output_dir", str(tmp_path / "out")])
    assert (model / "README.md").read_bytes() == before
    assert stored_results(tmp_path / "out")[0]["value"] == stored_results(model)[0]["value"]
    assert not (tmp_path / "out" / "README.md").exists()


def test_whether_weights_are_an_average_is_read_from_the_models_own_card(model, tmp_path):
    write_card(model, CardFacts(options={"use_ema": True}))
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_bytes(b"\xff notes of somebody")
    command = ["evaluate", str(model), *QUICK, "--metrics", "bpd", "--output_dir", str(out)]
    main(command)
    before = stored_results(out)
    assert before[0]["ema"] is True
    (model / "README.md").unlink()
    shutil.rmtree(out / "evaluation")
    main(command)  # it is unknown now, which changes no result
    assert stored_results(out) == before
    assert not list(out.glob("evaluation/likelihood-*"))
    (model / "README.md").write_bytes(b"\xff")
    with pytest.raises(SystemExit, match=r"model/README\.md.*UTF-8"):
        main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--seed", "1"])
    assert not (model / "metrics.json").exists()


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "digits", "--metrics", "bpd,fud"], "metrics.*'fud'.*fid,kid"),
        (["--dataset", "digits", "--metrics", "fd"], "metrics.*'fd'"),
        (["--dataset", "digits", "--metrics", "fid", "--feature_extractor", "{extractor}"], "metrics.*'fid'"),
        (["--dataset", "digits", "--metrics", "fid", "--inception_weights", "nowhere.pth"], "inception_weights|eval"),
        (["--dataset", "digits", "--feature_extractor", "/nowhere"], "feature_extractor.*/nowhere"),
        (["--dataset", "digits", "--test_split", "test"], "digits have no split .test.: leave it out"),
        (["--dataset", "digits", "--test_split", "a", "--test_data_dir", "b"], "leave one out"),
        (["--metrics", "bpd"], "dataset_name.*train_data_dir"),
        (["--train_data_dir", "{empty}"], "no images"),
        (["--dataset", "digits", "--steps", "21"], "num_inference_steps.*21"),
        (["--dataset", "digits", "--likelihood_steps", "21", "--metrics", "bpd"], "num_inference_steps.*21"),
        (["--dataset", "digits", "--metrics", "bpd", "--variance_type", "optimal"], "ddpm-hf calibrate"),
        (["--dataset", "digits", "--metrics", "bpd", "--calls_per_image", "20"], "calls_per_image.*20 steps.*leave"),
        (["--dataset", "digits", "--test_data_dir", "{digits}"], "test_data_dir.*all of them are training images"),
        (["--train_data_dir", "{digits}", "--test_data_dir", "{digits}"], "test_data_dir.*training images.*leave"),
        (["--dataset", "{digits}", "--test_split", "train"], "test_split.*training images.*leave"),
        (["--dataset", "{digits}", "--test_split", "train[:20]"], "test_split.*20 images.*training images.*leave"),
        (["--dataset", "digits", "--class_label", "1"], "unconditional"),
        (
            ["--dataset", "digits", "--metrics", "fd", "--num_images", "3", "--feature_extractor", "{extractor}"],
            "3 imag",
        ),
        (["--dataset", "digits", "--output_dir", "{file}"], "output_dir"),
        (["--dataset", "digits", "--output_dir", "{other}"], "another model"),
    ],
)
def test_bad_options_end_in_one_line_before_anything_is_made(options, message, model, extractor, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(model, tmp_path / "other")
    (tmp_path / "digits").mkdir()
    for i, pixels in enumerate(digits(DDPMPipelineCustom.from_pretrained(model).unet)[:40, 0].numpy()):
        Image.fromarray(pixels).save(tmp_path / "digits" / f"{i:02d}.png")
    places = {"extractor": extractor, **{name: tmp_path / name for name in ("empty", "file", "other", "digits")}}
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["evaluate", str(model), *(option.format(**places) for option in options)])
    assert not (model / "evaluation").exists()
    assert not (model / "metrics.json").exists()


def test_models_and_data_that_do_not_fit_are_refused(make_unet, tmp_path):
    conditional = save_model(make_unet(channels=1, num_class_embeds=3), tmp_path / "conditional")
    with pytest.raises(SystemExit, match="label_column"):
        main(["evaluate", str(conditional), *QUICK])
    with pytest.raises(SystemExit, match="label"):
        main(["evaluate", str(conditional), *QUICK, "--label_column", "label"])
    wide = save_model(make_unet(channels=1, sample_size=(8, 16)), tmp_path / "wide")
    with pytest.raises(SystemExit, match="sample_size"):
        main(["evaluate", str(wide), *QUICK])
    deep = save_model(make_unet(channels=5), tmp_path / "deep")
    with pytest.raises(SystemExit, match="channels.*5"):
        main(["evaluate", str(deep), *QUICK])
    with pytest.raises(SystemExit, match="--output_dir"):
        main(["evaluate", "google/ddpm-cifar10-32", *QUICK])


def test_images_that_are_in_both_sets_are_counted(model, tmp_path):
    train, unseen = save_noise(tmp_path / "train", 12, 0), save_noise(tmp_path / "unseen", 12, 1)
    for i in range(3):
        shutil.copy(train / f"{i}.png", unseen / f"{i + 20}.png")
    main(["evaluate", str(model), "--train_data_dir", str(train), "--test_data_dir", str(unseen), *QUICK[2:],
          "--metrics", "bpd,nearest", "--cache_dir", str(tmp_path / "cache")])  # fmt: skip
    bpd, nearest = stored_results(model)
    for result in (bpd, nearest):
        assert any("3 of the 15 images of unseen (test) are training images" in said for said in result["warnings"])
    assert any("20% of the held-out images are copies" in said for said in nearest["warnings"])


@pytest.mark.parametrize("channels", [2, 4])
def test_images_with_transparency_have_neighbours_but_no_features(channels, make_unet, extractor, tmp_path):
    model = save_model(make_unet(channels=channels), tmp_path / "model")
    nowhere = ["--train_data_dir", "/nowhere", "--feature_extractor", str(extractor)]
    with pytest.raises(SystemExit, match=f"{channels} channels.*--metrics bpd,nearest"):
        main(["evaluate", str(model), *nowhere, "--metrics", "nearest"])
    main(["evaluate", str(model), *QUICK, "--likelihood_steps", "2"])
    assert [f["metric"] for f in stored_results(model)] == ["bpd", "nearest"]


def test_a_scheduler_without_a_likelihood_is_refused_for_bpd_alone(make_unet, tmp_path):
    model = tmp_path / "model"
    DDPMPipelineCustom(make_unet(channels=1), DDIMScheduler(20)).save_pretrained(model)
    with pytest.raises(SystemExit, match="DDIMScheduler.*--metrics nearest"):
        main(["evaluate", str(model), *QUICK])
    main(["evaluate", str(model), *QUICK, "--metrics", "nearest"])
    assert [f["metric"] for f in stored_results(model)] == ["nearest"]


def test_a_foreign_metrics_file_is_not_overwritten(model):
    (model / "metrics.json").write_text('{"accuracy": 1}')
    with pytest.raises(SystemExit, match=r"metrics\.json.*move it away"):
        main(["evaluate", str(model), *QUICK, "--metrics", "bpd"])
    assert (model / "metrics.json").read_text() == '{"accuracy": 1}'


def test_enlarged_and_converted_images_are_reported(make_unet, tmp_path, capsys):
    model = save_model(make_unet(channels=3, sample_size=16), tmp_path / "model")
    main(["evaluate", str(model), *QUICK, "--metrics", "bpd", "--likelihood_steps", "2"])
    (result,), printed = stored_results(model), capsys.readouterr().out
    for words in ("8×8, and enlarged to the model's 16×16", "of mode L, and converted to the model's RGB"):
        assert any(words in warning for warning in result["warnings"])
        assert words in printed
