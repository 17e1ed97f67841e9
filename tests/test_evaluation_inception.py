"""`ddpm-hf evaluate` with Inception, against torch-fidelity on the files of the same images."""

import numpy as np
import pytest
import torch
from test_metrics_inception import photographs, save, torch_fidelity, weights  # noqa: F401

from ddpm_hf.cli import main


@pytest.mark.slow
def test_figures_are_those_of_torch_fidelity(make_unet, weights, tmp_path, monkeypatch):  # noqa: F811
    from test_evaluation import figures, save_model

    monkeypatch.setattr("ddpm_hf.reference_statistics.HF_HOME", str(tmp_path / "hf"))
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
    found = {figure["metric"]: figure["value"] for figure in figures(model)}
    assert found["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)
    assert found["isc"] == pytest.approx(expected["inception_score_mean"], rel=1e-4)
