"""Measurements of sample quality, with their errors and warnings."""

import pytest
import torch
from scipy.stats import binomtest

from ddpm_hf.evaluation.metrics.distances import frechet_distance, kernel_distance, moments, precision_recall
from ddpm_hf.evaluation.metrics.features import Extractor
from ddpm_hf.evaluation.metrics.measure import check_metrics, measure
from ddpm_hf.evaluation.metrics.measurement import Measurement
from ddpm_hf.evaluation.metrics.reference_statistics import Reference, reference_statistics
from support.features import images, linear_extractor


def test_measurements_are_the_distances_of_the_features(tmp_path):
    extractor, x, y = linear_extractor(), images(40), images(50, seed=1) // 2
    reference, features = reference_statistics(y, extractor, cache_dir=tmp_path), extractor(x)
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
    reference = reference_statistics(images(25), extractor, cache_dir=tmp_path)
    (found,) = measure(["fd"], extractor(images(20, seed=1)), reference, extractor)
    said = " ".join(found.warnings)
    for part in ("20 samples are too few for a covariance of 30", "25 real images are too few", "not the weights"):
        assert part in said


def test_interval_of_precision_is_wilsons():
    g = torch.Generator().manual_seed(0)
    extractor = linear_extractor()
    y = torch.randn(300, 6, generator=g)
    reference = Reference(moments(y), y, {"extractor": "linear"})
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
def test_metrics_that_cannot_be_measured_are_refused(names, extractor, n, m, message):
    with pytest.raises(ValueError, match=message):
        check_metrics(names, extractor, n, m)


def test_smallest_sets_are_enough(tmp_path):
    extractor = linear_extractor()
    check_metrics(["fd", "kd", "prc"], "some/model", 4, 4)
    reference = reference_statistics(images(4), extractor, cache_dir=tmp_path)
    assert len(measure(["fd", "kd", "prc"], extractor(images(4, seed=1)), reference, extractor)) == 4


def test_statistics_of_another_extractor_are_refused(tmp_path):
    reference = reference_statistics(images(20), linear_extractor(name="one"), cache_dir=tmp_path)
    other = linear_extractor(name="two")
    with pytest.raises(ValueError, match="statistics are by one, but .* by two"):
        measure(["fd"], other(images(20)), reference, other)
