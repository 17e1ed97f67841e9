"""FID, KID, IS, precision and recall against torch-fidelity, called directly on files of the same images."""

import hashlib
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

torch_fidelity = pytest.importorskip("torch_fidelity", exc_type=ImportError, reason="needs the extra [eval]")

from torch_fidelity import feature_extractor_inceptionv3  # noqa: E402

from ddpm_hf.cli import main  # noqa: E402
from ddpm_hf.evaluation.metrics import inception  # noqa: E402
from ddpm_hf.evaluation.metrics import measure as metrics  # noqa: E402
from ddpm_hf.evaluation.metrics.distances import frechet_distance, moments, precision_recall  # noqa: E402
from ddpm_hf.evaluation.metrics.features import open_extractor  # noqa: E402
from ddpm_hf.evaluation.metrics.measure import measure  # noqa: E402
from ddpm_hf.evaluation.metrics.reference_statistics import reference_statistics  # noqa: E402
from support.evaluation import save_model, stored_results  # noqa: E402

N, M, BATCH = 20, 24, 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file as torch-fidelity publishes it, but with random numbers: the real one can't be downloaded in tests."""

    class Untrained(torch_fidelity.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        network = Untrained("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if "conv.weight" in name:
            torch.nn.init.kaiming_normal_(parameter)
    network.fc.weight.normal_(std=0.05)
    file = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), file)
    return file


def photographs(count, channels, seed):
    """Smooth random images, uint8 (count, channels, 16, 16)."""
    coarse = torch.rand(count, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def save(images, folder):
    folder.mkdir()
    for i, image in enumerate(images):
        array = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        Image.fromarray(array).save(folder / f"{i:03}.png")
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "names"), [(1, ["kid", "isc", "prc"]), (3, ["fid", "kid", "isc", "prc"])])
def test_metrics_are_those_of_torch_fidelity_on_the_same_files(channels, names, weights, tmp_path):
    fake, real = photographs(N, channels, 1), photographs(M, channels, 2) // 2
    extractor = open_extractor(inception_weights=weights, device=torch.device("cpu"))
    reference = reference_statistics(real, extractor, cache_dir=tmp_path, batch_size=BATCH)
    found = {m.metric: m for m in measure(names, extractor(fake, BATCH), reference, extractor)}
    direct = torch_fidelity.calculate_metrics(
        input1=save(fake, tmp_path / "fake"), input2=save(real, tmp_path / "real"), batch_size=BATCH, cuda=False,
        fid="fid" in names, kid=True, isc=True, prc=True, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), kid_subset_size=min(N, M) // 2, cache=False, save_cpu_ram=True,
        verbose=False,
    )  # fmt: skip
    assert found["kid"].value == direct["kernel_inception_distance_mean"]
    assert found["kid"].std == direct["kernel_inception_distance_std"]
    assert found["isc"].value == direct["inception_score_mean"]
    assert found["isc"].std == direct["inception_score_std"]
    assert found["precision"].value == pytest.approx(direct["precision"], rel=1e-6)  # a mean of float32 there
    assert found["recall"].value == pytest.approx(direct["recall"], rel=1e-6)
    if "fid" in names:  # which is slow; with fewer images than features, its eigenvalues that should be zero are not
        assert found["fid"].value == pytest.approx(direct["frechet_inception_distance"], rel=1e-4)
    assert "not the published ones" in " ".join(found["kid"].warnings)
    assert (found["kid"].num_images, found["kid"].num_reference) == (N, M)


def test_frechet_distance_and_precision_recall_are_those_of_torch_fidelity_up_to_rounding():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = torch.randn(900, 100) * 1.2 + 0.1, torch.randn(800, 100)
    direct = fid_statistics_to_metric(*map(fid_features_to_statistics, (x, y)), verbose=False)
    ours = frechet_distance(moments(x), moments(y))
    assert ours == pytest.approx(direct["frechet_inception_distance"], rel=1e-6)
    direct = prc_features_to_metric(x, y, verbose=False)
    assert precision_recall(x, y) == pytest.approx((direct["precision"], direct["recall"]), rel=1e-6)


def test_inception_score_of_certain_predictions_is_the_number_of_classes():
    logits = torch.eye(1008)[torch.arange(10_000) % 10] * 100
    features = metrics.Features(torch.zeros(10_000, 2), logits)
    (found,) = metrics._inception_score(features, None)
    assert found.value == pytest.approx(10, rel=0.02)
    assert found.low <= found.value <= found.high


def test_images_are_resized_as_on_a_machine_without_torchvision(tmp_path):
    model = transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    model.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    assert "resized by CLIPImageProcessorPil" in open_extractor(str(tmp_path), device=torch.device("cpu")).identity


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_weights_are_never_unpickled(tmp_path, capsys):
    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="must be torch-fidelity's weights-inception"):
        open_extractor(inception_weights=file)
    torch.save({"fc.weight": Evil()}, file)
    with pytest.raises(ValueError, match="must be torch-fidelity's weights-inception"):
        open_extractor(inception_weights=file)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"no weights", "other weights"])
def test_for_bad_weights_the_error_names_the_right_ones(content, tmp_path):
    file = tmp_path / "weights.pth"
    if content == "other weights":
        torch.save({"layer.weight": torch.zeros(3)}, file)
    elif content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"weights.pth.*can't be used.*{inception.URL}"):
        open_extractor("inception", inception_weights=file)


@pytest.fixture
def served(weights, tmp_path, monkeypatch):
    """A server of the weights on this machine; returns what torch's folder of downloads is."""
    handler = partial(SimpleHTTPRequestHandler, directory=weights.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(inception, "URL", f"http://127.0.0.1:{server.server_port}/{weights.name}")
    monkeypatch.setattr(inception, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    yield tmp_path / "checkpoints"
    server.shutdown()
    server.server_close()
    thread.join()


def test_weights_are_downloaded_once(served, weights, monkeypatch):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest)
    assert inception.downloaded_weights() == served / inception.WEIGHTS
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:1/gone")
    assert inception.downloaded_weights().read_bytes() == weights.read_bytes()


def test_a_download_of_other_weights_is_refused_and_leaves_no_file(served):
    with pytest.raises(ValueError, match="can't be downloaded.*--inception_weights"):
        inception.downloaded_weights()
    assert list(served.iterdir()) == []


@pytest.mark.parametrize("offline", [False, True])
def test_without_internet_the_error_names_the_file_and_its_place(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:1/gone")
    monkeypatch.setattr(inception, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(ValueError, match=f"get http.*--inception_weights, or put it at .*{inception.WEIGHTS}"):
        open_extractor()


@pytest.mark.slow
def test_results_are_those_of_torch_fidelity(make_unet, weights, tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_hf.evaluation.metrics.reference_statistics.HF_HOME", str(tmp_path / "hf"))
    model = save_model(make_unet(channels=3), tmp_path / "model")
    real = save(photographs(24, 3, 2)[..., ::2, ::2], tmp_path / "real")
    main(["evaluate", str(model), "--train_data_dir", real, "--num_images", "20", "--steps", "2", "--cache_dir",
          str(tmp_path / "cache"), "--inception_weights", str(weights), "--metrics", "fid,isc"])  # fmt: skip
    (file,) = model.glob("evaluation/samples-*/samples.npz")
    fake = save(torch.from_numpy(np.load(file)["arr_0"]).permute(0, 3, 1, 2), tmp_path / "fake")
    expected = torch_fidelity.calculate_metrics(
        input1=fake, input2=real, fid=True, isc=True, cuda=False, verbose=False, cache=False, batch_size=8,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    found = {result["metric"]: result["value"] for result in stored_results(model)}
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["isc"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
