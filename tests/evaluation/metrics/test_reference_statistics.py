"""Statistics of real images: computed once, and never those of other images."""

import pytest
import torch

from ddpm_hf.evaluation.metrics import reference_statistics as references
from ddpm_hf.evaluation.metrics.distances import moments
from ddpm_hf.evaluation.metrics.features import Extractor
from ddpm_hf.evaluation.metrics.reference_statistics import evenly_spaced, reference_statistics
from support.features import images, linear_extractor


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
