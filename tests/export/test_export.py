"""What `ddpm-hf export` writes is enough for a program that knows neither PyTorch nor this package."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.cli import main
from ddpm_hf.export.export import export_onnx
from ddpm_hf.sampling.generate import sample_pixels
from ddpm_hf.sampling.onnx_network import OnnxNetwork, write_onnx
from ddpm_hf.sampling.philox import philox4x32

# The contract of docs/pages/demo.md, by somebody who has only numpy and onnxruntime.
STRANGER = """
import json, sys
import numpy as np, onnxruntime

folder, seed, label = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
s = json.load(open(folder + "/sampler.json"))
session = onnxruntime.InferenceSession(folder + "/model.onnx")
shape = (1, s["image"]["channels"], s["image"]["height"], s["image"]["width"])

def z(n):
    count = np.prod(shape)
    c = [np.arange(-(-count // 4), dtype=np.uint64) * k for k in (1, 0, 0, 0)]
    c[1] = c[1] + np.uint64(n)
    for i in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0 = ((seed & 0xFFFFFFFF) + i * 0x9E3779B9) & 0xFFFFFFFF
        k1 = ((seed >> 32) + i * 0xBB67AE85) & 0xFFFFFFFF
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        c = [b >> high ^ c[1] ^ np.uint64(k0), b & low, a >> high ^ c[3] ^ np.uint64(k1), a & low]
    c = [word.astype(float) for word in c]
    pairs = [(np.sqrt(-2 * np.log((u + 1) / 2**32)), 2 * np.pi * v / 2**32) for u, v in ((c[0], c[1]), (c[2], c[3]))]
    values = [f for r, p in pairs for f in (r * np.cos(p), r * np.sin(p))]
    return np.stack(values, -1).reshape(-1)[:count].reshape(shape).astype(np.float32)

def network(x, t):
    inputs = {"x": x.astype(np.float32), "t": np.array([t])}
    if s["num_classes"]:
        inputs["class_labels"] = np.array([label])
    return np.split(session.run(None, inputs)[0], [shape[1]], axis=1)

x = z(0)
before = 0
for n, row in enumerate(s["trajectory"]["steps"], 1):
    out, v = network(x, row["t"])
    x_0 = row["x_0_from_x_t"] * x + row["x_0_from_output"] * out
    if s["clip"]:
        x_0 = x_0.clip(-s["clip"], s["clip"])
    if "std" in row:
        std = row["std"]
    elif s["variance_type"] == "learned":
        std = row["noise_scale"] * np.exp(v / 2)
    else:
        low, high = row["log_variance_low"], row["log_variance_high"]
        std = row["noise_scale"] * np.exp((low + (v + 1) / 2 * (high - low)) / 2)
    x = row["mean_from_x_0"] * (x_0 + row["extrapolation"] * (x_0 - before)) + row["mean_from_x_t"] * x + std * z(n)
    before = x_0
np.save(folder + "/image.npy", ((x.clip(-1, 1) + 1) / 2 * 255).round().astype(np.uint8))
assert "torch" not in sys.modules
"""

MODELS = {
    "second order": ({}, {}, ["--eta", "0", "--solver_order", "2", "--spacing", "trailing"]),
    "classes, velocity": (
        {"num_class_embeds": 5},
        {"variance_type": "fixed_large", "prediction_type": "v_prediction", "clip_sample": False},
        ["--eta", "0.5"],
    ),
    "learned range": ({"out_channels": 6}, {"variance_type": "learned_range"}, ["--solver_order", "2"]),
    "learned": (
        {"out_channels": 6},
        {"variance_type": "learned", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        [],
    ),
}


def save(make_unet, folder, network=(), scheduler=()):
    unet = make_unet(**dict(network))
    if unet.config.out_channels == 6:  # log variances as networks learn them, not as they start
        unet.conv_out.bias.data[3:] = -4.0
    pipeline = DDPMPipelineCustom(unet, DDPMSchedulerCustom(**dict(scheduler)))
    pipeline.save_pretrained(folder)
    return pipeline


@pytest.mark.parametrize("case", MODELS)
def test_a_program_with_numpy_and_onnxruntime_samples_our_images(case, make_unet, tmp_path, monkeypatch):
    network, scheduler, flags = MODELS[case]
    if case != next(iter(MODELS)):  # the exporter that takes long is seen once
        monkeypatch.setattr("ddpm_hf.export.export.write_onnx", partial(write_onnx, quickly=True))
    save(make_unet, tmp_path / "model", network, scheduler)
    label = ["--class_label", "3"] if network.get("num_class_embeds") else []
    options = ["--steps", "12", *flags]
    main(["export", str(tmp_path / "model"), *options])
    options += ["--rng", "philox", "--num_images", "2", "--seed", "6", "--device", "cpu"]
    main(["sample", str(tmp_path / "model"), *options, *label, "--output_dir", str(tmp_path / "ours")])
    for i in range(2):
        program = [sys.executable, "-c", STRANGER, str(tmp_path / "model" / "onnx"), str(6 + i), "3"]
        subprocess.run(program, check=True, cwd=tmp_path)
        theirs = np.load(tmp_path / "model" / "onnx" / "image.npy")[0].transpose(1, 2, 0)
        ours = np.asarray(Image.open(tmp_path / "ours" / f"{i:05d}.png"))
        assert np.abs(theirs.astype(int) - ours).max() <= 1
        assert ours.std() > 10


def test_philox_gives_the_published_words():
    """The known answers of Random123, its authors' library."""
    ones = np.array([0xFFFFFFFF])
    pi = [np.array([word]) for word in (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    answers = [
        (([0 * ones] * 4), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (([ones] * 4), (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]
    for counter, key, words in answers:
        assert [f"{int(word):08x}" for word in philox4x32(counter, key)[0]] == words.split()


def test_philox_noise_is_normal_and_an_image_does_not_depend_on_the_batch(make_unet):
    from scipy.stats import kstest

    from ddpm_hf.sampling.philox import philox_normal

    draws = np.stack([philox_normal(7, n, 50_000) for n in range(2)])
    assert kstest(draws.reshape(-1), "norm").pvalue > 0.01
    assert abs(np.corrcoef(draws)[0, 1]) < 0.02
    pipeline = DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom())
    batches = [
        torch.cat([p for _, p in sample_pixels(pipeline, 4, 7, b, num_inference_steps=3, rng="philox")]) for b in (1, 4)
    ]
    assert (batches[0].int() - batches[1].int()).abs().max() <= 1


@pytest.mark.parametrize("network", [{"num_class_embeds": 3, "sample_size": (8, 16)}, {"out_channels": 6}])
def test_the_quick_exporter_gives_the_network_for_any_batch(network, make_unet, tmp_path):
    from ddpm_hf.sampling.onnx_network import open_session

    unet = make_unet(**network)
    write_onnx(unet, tmp_path / "model.onnx", quickly=True)
    session = open_session(tmp_path / "model.onnx")
    for batch in (1, 5):
        x, t = torch.randn(batch, 3, *(network.get("sample_size") or (8, 8))), torch.arange(batch) * 100
        labels = torch.arange(batch) % 3 if "num_class_embeds" in network else None
        with torch.no_grad():
            expected = unet(x, t, class_labels=labels).sample
        inputs = {"x": x.numpy(), "t": t.numpy(), **({} if labels is None else {"class_labels": labels.numpy()})}
        assert np.abs(session.run(None, inputs)[0] - expected.numpy()).max() < 1e-5


def test_half_precision_has_its_own_tolerance_and_no_path_of_this_machine_is_written(make_unet, tmp_path):
    pipeline = save(make_unet, tmp_path / "model", {"num_class_embeds": 3, "sample_size": (8, 16)})
    facts = export_onnx(pipeline, tmp_path / "onnx", "float16", num_inference_steps=5)["model"]
    assert 1e-5 < facts["largest_difference"] <= facts["tolerance"] == 2e-2
    assert json.loads((tmp_path / "onnx" / "sampler.json").read_text())["model"] == facts
    assert pipeline.unet.dtype == torch.float32
    written = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert b"site-packages" not in written
    assert b".py" not in written


def test_a_file_that_differs_from_the_network_is_refused_and_the_earlier_one_stays(make_unet, tmp_path, monkeypatch):
    pipeline = save(make_unet, tmp_path / "model")
    monkeypatch.setattr("ddpm_hf.export.export.write_onnx", partial(write_onnx, quickly=True))
    facts = export_onnx(pipeline, tmp_path / "onnx", num_inference_steps=5)["model"]
    assert facts["largest_difference"] <= facts["tolerance"] == 1e-5
    before = {f.name: f.read_bytes() for f in (tmp_path / "onnx").iterdir()}
    other = make_unet()
    other.conv_out.bias.data += 1e-3
    monkeypatch.setattr("ddpm_hf.export.export.write_onnx", lambda _, *rest: write_onnx(other, *rest, quickly=True))
    with pytest.raises(ValueError, match="differs from PyTorch's by 0.001"):
        export_onnx(pipeline, tmp_path / "onnx", num_inference_steps=7)
    assert {f.name: f.read_bytes() for f in (tmp_path / "onnx").iterdir()} == before


def test_mistakes_are_found_before_the_network_is_exported(make_unet, tmp_path):
    save(make_unet, tmp_path / "model")
    for flags, message in [
        (["--steps", "1001"], "must be an integer from 1 to 1000"),
        (["--spacing", "optimal"], "calibrat"),
        (["--output_dir", "/proc/nowhere"], "can't be written to"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(["export", str(tmp_path / "model"), *flags])
    with pytest.raises(SystemExit, match="--output_dir"):
        main(["export", "me/model"])
    assert not (tmp_path / "model" / "onnx").exists()


def test_onnxruntime_takes_the_networks_place_until_its_weights_change(make_unet):
    unet = make_unet(num_class_embeds=4)
    twin = OnnxNetwork(unet)
    x, t, labels = torch.randn(3, 3, 8, 8), torch.tensor(500), torch.tensor([0, 1, 3])
    with torch.no_grad():
        assert (twin(x, t, labels)[0] - unet(x, t, class_labels=labels).sample).abs().max() < 1e-5
    assert twin.is_twin_of(unet)
    unet.conv_out.bias.data += 1
    assert not twin.is_twin_of(unet)
