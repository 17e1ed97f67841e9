"""Features of any vision model, their stored statistics, and the measurements with their errors and warnings."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from ddpm_hf.evaluation.metrics import reference_statistics as references
from ddpm_hf.evaluation.metrics.distances import frechet_distance, kernel_distance, moments, precision_recall
from ddpm_hf.evaluation.metrics.features import Extractor, open_extractor
from ddpm_hf.evaluation.metrics.measure import check_metrics, measure
from ddpm_hf.evaluation.metrics.measurement import Measurement
from ddpm_hf.evaluation.metrics.reference_statistics import evenly_spaced, reference_statistics

CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32}, "resample": 3,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}  # fmt: skip


def saved(model, folder):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


@pytest.fixture
def resnet(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return saved(ResNetForImageClassification(config), tmp_path / "resnet")


def images(count, channels=3, seed=0, size=8):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=g)


def linear_extractor(dim=6, name="linear"):
    """A network whose features are known: a fixed linear map of the pixels."""
    weights = torch.randn(3 * 64, dim, generator=torch.Generator().manual_seed(dim)) / 64
    return Extractor(name, dim, lambda x: x.flatten(1).float() @ weights)


# --- Extractors ----------------------------------------------------------------------------------------------------


def test_features_are_the_pooled_output_of_the_model_on_pixels_in_its_range(resnet):
    x = images(5, size=32)  # the size of the processor: nothing is resized
    found = open_extractor(resnet, device=CPU)(x, batch_size=2, show_progress=False)
    model = ResNetForImageClassification.from_pretrained(resnet).eval()
    with torch.no_grad():
        expected = model.resnet(x.float() / 127.5 - 1).pooler_output.flatten(1)
    torch.testing.assert_close(found.pooled, expected, rtol=1e-4, atol=1e-5)
    assert found.pooled.dtype == torch.float32
    assert not found.is_inception


def test_grayscale_is_repeated_and_images_of_three_pixels_are_read_the_right_way_round(resnet):
    extractor = open_extractor(resnet, device=CPU)
    gray = images(4, channels=1)
    assert torch.equal(extractor(gray).pooled, extractor(gray.repeat(1, 3, 1, 1)).pooled)
    narrow = images(4, size=3)
    turned = narrow.transpose(1, 2).contiguous()
    assert not torch.allclose(extractor(narrow).pooled, extractor(turned).pooled)


def test_a_pooler_that_the_weights_lack_is_not_filled_with_random_numbers(tmp_path):
    folder = saved(ViTForImageClassification(ViTConfig(**SMALL, image_size=32, patch_size=8)), tmp_path)
    first, second = open_extractor(folder, device=CPU), open_extractor(folder, device=CPU)
    x = images(3, size=32)
    assert torch.equal(first(x).pooled, second(x).pooled)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.vit(x.float() / 127.5 - 1).last_hidden_state
    torch.testing.assert_close(first(x).pooled, hidden.mean(1), rtol=1e-4, atol=1e-5)
    assert "mean of the last hidden state" in first.identity


def test_of_clip_the_image_embedding_is_taken(tmp_path):
    config = CLIPConfig(
        text_config={**SMALL, "vocab_size": 10}, vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    folder = saved(CLIPModel(config), tmp_path)
    extractor = open_extractor(folder, device=CPU)
    assert extractor(images(2)).pooled.shape == (2, 12)
    assert "image embedding" in extractor.identity


def test_weights_of_half_precision_are_used_in_float32(resnet, tmp_path):
    model = ResNetForImageClassification.from_pretrained(resnet).half().eval()
    folder, x = saved(model, tmp_path / "half"), images(3, size=32)
    with torch.no_grad():
        expected = model.float().resnet(x.float() / 127.5 - 1).pooler_output.flatten(1)
    torch.testing.assert_close(open_extractor(folder, device=CPU)(x).pooled, expected, rtol=1e-4, atol=1e-5)


def test_identity_changes_with_weights_and_resizing_and_holds_no_path(resnet, tmp_path):
    first = open_extractor(resnet, device=CPU).identity
    assert open_extractor(resnet, device=CPU).identity == first
    assert str(tmp_path) not in first
    file = tmp_path / "resnet" / "preprocessor_config.json"
    file.write_text(json.dumps({**PROCESSOR, "resample": 2}))
    second = open_extractor(resnet, device=CPU).identity
    file = tmp_path / "resnet" / "model.safetensors"
    save_file({k: v + 1e-4 if v.ndim == 4 else v for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert len({first, second, open_extractor(resnet, device=CPU).identity}) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (images(2, channels=4), "4 channels, but .* 1 .grayscale. or 3 .RGB."),
        (images(2).float(), "torch.float32 .* must be a uint8 tensor"),
        (images(2)[0], "must be a uint8 tensor of shape"),
        (images(2)[:0], "N at least 1"),
        (images(2).numpy(), "ndarray"),
    ],
)
def test_images_of_other_kinds_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        linear_extractor()(bad)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity.* damaged"):
        Extractor("broken", 2, lambda x: torch.full((len(x), 2), torch.nan))(images(3))


def test_extractors_that_cannot_be_loaded_are_refused(resnet, tmp_path):
    def refused(name, message, **options):
        with pytest.raises(ValueError, match=message):
            open_extractor(str(name), device=CPU, **options)

    refused(tmp_path / "nothing", "can't be loaded")
    refused(resnet, "another network", inception_weights=tmp_path / "w.pth")
    text = BertModel(BertConfig(**SMALL, vocab_size=10))
    text.save_pretrained(tmp_path / "text")
    refused(tmp_path / "text", "image processor")

    folder = tmp_path / "resnet"
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "convolution" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "incomplete")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")  # a pickle
    refused(folder, "safetensors")


def test_code_of_a_model_is_never_run(tmp_path):
    trap = tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(trap)!r}).touch()\nclass C: pass\n"
    (tmp_path / "modeling.py").write_text(code)
    reference = {"AutoConfig": "modeling.C", "AutoModel": "modeling.C", "AutoImageProcessor": "modeling.C"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": reference}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, "auto_map": reference}))
    with pytest.raises(ValueError, match="without code of its own"):
        open_extractor(str(tmp_path), device=CPU)
    assert not trap.exists()


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r'pip install "ddpm-hf\[eval\]".*--feature_extractor'):
        open_extractor()


# --- Reference statistics ------------------------------------------------------------------------------------------


class CountingExtractor:
    """Counts what is computed."""

    def __init__(self, dim=6, name="linear"):
        self.images, inner = 0, linear_extractor(dim, name)

        def network(x):
            self.images += len(x)
            return inner.network(x)

        self.extractor = Extractor(name, dim, network)


def statistics(x, extractor, cache_dir):
    return reference_statistics(x, extractor, cache_dir=cache_dir, show_progress=False)


def test_statistics_are_computed_once(tmp_path):
    counting, x = CountingExtractor(), images(20)
    computed = statistics(x, counting.extractor, cache_dir=tmp_path)
    read = statistics(x.clone(), counting.extractor, cache_dir=tmp_path)
    assert counting.images == 20
    for a, b in ((computed.moments.mean, read.moments.mean), (computed.moments.covariance, read.moments.covariance),
                 (computed.features, read.features)):  # fmt: skip
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert read.moments.num_images == 20
    assert torch.equal(read.features, counting.extractor(x).pooled)


def test_other_data_or_another_extractor_has_other_statistics(tmp_path):
    x, counting = images(20), CountingExtractor()
    others = [(x, counting), (x[:19], counting), (x.flip(0), counting), (images(20, channels=1), counting),
              (x.reshape(20, 3, 4, 16), counting), (x, CountingExtractor(name="other"))]  # fmt: skip
    for data, extractor in others:
        statistics(data, extractor.extractor, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(others)


def test_a_cached_file_of_other_data_is_never_used(tmp_path):
    counting, x, y = CountingExtractor(), images(20), images(20, seed=1)
    statistics(x, counting.extractor, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    expected = statistics(y, counting.extractor, cache_dir=tmp_path)
    (other,) = set(tmp_path.iterdir()) - {file}
    other.write_bytes(file.read_bytes())
    with pytest.warns(UserWarning, match="damaged.*statistics of other images.*computed anew"):
        found = statistics(y, counting.extractor, cache_dir=tmp_path)
    assert torch.equal(found.moments.mean, expected.moments.mean)


@pytest.mark.parametrize("damage", ["empty", "cut", "a bit", "not tensors"])
def test_damaged_statistics_are_computed_anew_with_a_warning(damage, tmp_path):
    counting, x = CountingExtractor(), images(20)
    expected = statistics(x, counting.extractor, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes({"empty": b"", "cut": content[:-9], "a bit": content, "not tensors": b"x" * 999}[damage])
    with pytest.warns(UserWarning, match="damaged.*computed anew"):
        found = statistics(x, counting.extractor, cache_dir=tmp_path)
    assert torch.equal(found.features, expected.features)
    statistics(x, counting.extractor, cache_dir=tmp_path)
    assert counting.images == 40


def test_without_a_writable_cache_statistics_are_computed_with_a_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="can't be written to.*--cache_dir"):
        found = statistics(images(20), linear_extractor(), cache_dir=tmp_path / "file")
    assert found.moments.num_images == 20


def test_of_large_sets_evenly_spaced_features_are_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MAX_STORED", 10)
    x, extractor = images(50), linear_extractor()
    found = statistics(x, extractor, cache_dir=tmp_path)
    assert torch.equal(found.features, extractor(x).pooled[[0, 5, 10, 16, 21, 27, 32, 38, 43, 49]])
    assert torch.equal(found.moments.covariance, moments(extractor(x).pooled).covariance)


def test_evenly_spaced_rows_are_distinct():
    rows = torch.arange(1003)
    assert torch.equal(evenly_spaced(rows, 1003), rows)
    assert evenly_spaced(rows, 1002).unique().numel() == 1002


# --- Measurements --------------------------------------------------------------------------------------------------


def test_measurements_are_the_distances_of_the_features(tmp_path):
    extractor, x, y = linear_extractor(), images(40), images(50, seed=1) // 2
    reference, features = statistics(y, extractor, cache_dir=tmp_path), extractor(x)
    found = {m.metric: m for m in measure(["fd", "kd", "prc"], features, reference, extractor)}
    assert list(found) == ["fd", "kd", "precision", "recall"]
    a, b = features.pooled, reference.features
    assert found["fd"].value == pytest.approx(frechet_distance(moments(a), moments(b)), rel=1e-12)
    assert found["kd"].value == kernel_distance(a, b).value
    assert (found["precision"].value, found["recall"].value) == precision_recall(a, b)
    for m in found.values():
        assert (m.num_images, m.num_reference) == (40, 50)
        assert m.low is None or m.low <= m.value <= m.high
    assert "only values of equal N" in " ".join(found["fd"].warnings)


def test_too_few_images_for_a_covariance_and_foreign_weights_are_warned_of(tmp_path):
    extractor = linear_extractor(dim=30)
    extractor = Extractor("linear", 30, extractor.network, warnings=("not the weights of publications",))
    reference = statistics(images(25), extractor, cache_dir=tmp_path)
    (found,) = measure(["fd"], extractor(images(20, seed=1)), reference, extractor)
    said = " ".join(found.warnings)
    for part in ("20 samples are too few for a covariance of 30", "25 real images are too few", "not the weights"):
        assert part in said


def test_interval_of_precision_is_wilsons():
    g = torch.Generator().manual_seed(0)
    extractor = linear_extractor()
    y = torch.randn(300, 6, generator=g)
    reference = references.Reference(moments(y), y, {"extractor": "linear"})
    features = extractor(images(3))._replace(pooled=torch.randn(200, 6, generator=g) * 1.5)
    precision, recall = measure(["prc"], features, reference, extractor)
    expected = binomtest(round(precision.value * 200), 200).proportion_ci(method="wilson")
    assert (precision.low, precision.high) == pytest.approx((expected.low, expected.high), rel=1e-4)
    assert (recall.low, recall.high) == (None, None)


def test_measurement_in_words():
    text = str(Measurement("fid", 12.3456, 1000, 5000, low=11.0, high=13.5, bias=2.1))
    assert text == "fid 12.35 (N = 1,000, 95 %: 11 to 13.5, of which about 2.1 is finite-sample bias)"
    assert str(Measurement("isc", 9.4567, 1000, std=0.123)) == "isc 9.457 ± 0.12 (N = 1,000)"


@pytest.mark.parametrize(
    ("names", "extractor", "n", "m", "message"),
    [
        (
            ["fid"],
            "facebook/dinov2-base",
            100,
            None,
            "has 'fid', but the metrics in the features of 'facebook/dinov2-base' .* fd, kd",
        ),
        (["isc"], "some/model", 100, None, "has 'isc'"),
        (["fd"], None, 100, None, "has 'fd', but the metrics in the features of Inception are fid, kid, isc, prc"),
        (["bpd2"], "inception", 100, None, "has 'bpd2'"),
        (["kid", "isc"], None, 5, 100, "`num_images` has 5 images, but isc needs at least 10"),
        (["prc"], None, 100, 3, "`reference` has 3 images, but prc needs at least 4"),
    ],
)
def test_metrics_that_cannot_be_measured_are_refused_before_anything_is_sampled(names, extractor, n, m, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(names, extractor, n, m)


def test_smallest_sets_are_enough(tmp_path):
    extractor = linear_extractor()
    check_metrics(["fd", "kd", "prc"], "some/model", 4, 4)
    reference = statistics(images(4), extractor, cache_dir=tmp_path)
    assert len(measure(["fd", "kd", "prc"], extractor(images(4, seed=1)), reference, extractor)) == 4


def test_statistics_of_another_extractor_are_refused(tmp_path):
    reference = statistics(images(20), linear_extractor(name="one"), cache_dir=tmp_path)
    other = linear_extractor(name="two")
    with pytest.raises(ValueError, match="statistics are by one, but .* by two"):
        measure(["fd"], other(images(20)), reference, other)
