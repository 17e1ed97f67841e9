"""Fast sampling: what is chosen for a machine and a job, and that it changes images by rounding alone."""

import functools
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.cli import main
from ddpm_hf.sampling import fast
from ddpm_hf.sampling.batch_size import fitting_batch_size
from ddpm_hf.sampling.fast import fast_network, sampling_dtype


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.fixture
def make_pipeline(make_unet):
    def make(**unet_options):
        pipeline = DDPMPipelineCustom(make_unet(**unet_options), DDPMSchedulerCustom(timestep_spacing="trailing"))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture
def half_precision(monkeypatch):
    """Half precision pays for every network on any machine."""
    monkeypatch.setattr(fast, "BFLOAT16_PARAMETERS", 0)
    monkeypatch.setattr(fast, "cpu_has_bfloat16", lambda: True)


@pytest.fixture
def compilation(monkeypatch):
    """A compiler that traces as the real one does and generates no code; what it makes takes a tenth of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(_compile, torch.compile))
    monkeypatch.setattr(fast, "missing_packages", lambda: ["onnxruntime"])
    times = iter([1.0, 0.1] * 10)
    monkeypatch.setattr(fast, "seconds_per_call", lambda *arguments: next(times))
    yield
    torch.compiler.reset()


def _compile(compile_, *arguments, mode, graphs=None, **options):
    def trace(graph, inputs):
        if graphs is not None:
            graphs.append(graph)
        return graph.forward

    return compile_(*arguments, backend=trace, **options)


# --- the same images -----------------------------------------------------------------------------------------------


def test_small_networks_stay_in_float32(make_pipeline):
    pipe = make_pipeline()
    plain = pipe(2, generators(0, 1), 5, "pt").images
    assert "float32" in pipe.enable_fast_sampling(num_images=2, num_inference_steps=5)
    torch.testing.assert_close(pipe(2, generators(0, 1), 5, "pt").images, plain, rtol=0, atol=1e-5)


def test_compiled_network_gives_the_same_images_at_every_batch_size(make_pipeline, compilation):
    pipe = make_pipeline()
    plain = [pipe(n, generators(*range(n)), 5, "pt").images for n in (2, 3)]
    assert "compiled for batches of 2 (10.00 times" in pipe.enable_fast_sampling(10**6, 1000, batch_size=2)
    for n, images in zip((2, 3), plain, strict=True):  # the last batch of a job is seldom a full one
        torch.testing.assert_close(pipe(n, generators(*range(n)), 5, "pt").images, images, rtol=0, atol=1e-5)


def test_one_compilation_serves_the_trial_and_the_job(make_pipeline, half_precision, monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(_compile, torch.compile, graphs=graphs))
    monkeypatch.setattr(fast, "missing_packages", lambda: ["onnxruntime"])
    times = iter([1.0, 0.1])
    measure = fast.seconds_per_call
    monkeypatch.setattr(fast, "seconds_per_call", lambda *arguments: (measure(*arguments), next(times))[1])
    pipe = make_pipeline(num_class_embeds=4)
    pipe.enable_fast_sampling(10**6, 1000, batch_size=2)
    pipe(2, generators(0, 1), 3, class_labels=1)
    assert len(graphs) == 1
    torch.compiler.reset()


def test_onnxruntime_gives_the_same_images_where_it_is_faster(make_pipeline, monkeypatch):
    times = iter([1.0, 0.5] * 2)  # of PyTorch, of onnxruntime
    monkeypatch.setattr(fast, "seconds_per_call", lambda *arguments: next(times))
    pipe = make_pipeline(num_class_embeds=4)
    options = {"class_labels": 1, "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "pt"}
    plain = [pipe(n, generators(*range(n)), **options).images for n in (2, 3)]
    described = pipe.enable_fast_sampling(200, 1, batch_size=2, guidance_scale=2.0)
    assert described.startswith("float32 by onnxruntime (2.00 times as fast as PyTorch); not compiled (about 90 s")
    assert pipe.sampling_dtype == torch.float32
    for n, images in zip((2, 3), plain, strict=True):
        torch.testing.assert_close(pipe(n, generators(*range(n)), **options).images, images, rtol=0, atol=1e-5)
    pipe.unet.conv_out.bias.data += 1
    with pytest.raises(ValueError, match="its weights changed"):
        pipe(2, generators(0, 1), **options)
    assert "by onnxruntime" in pipe.enable_fast_sampling(200, 1, batch_size=2, guidance_scale=2.0)


def test_onnxruntime_that_is_slower_or_fails_is_left_out(make_unet, monkeypatch):
    times = iter([1.0, 0.99, 1.0])
    monkeypatch.setattr(fast, "seconds_per_call", lambda *arguments: next(times))
    network, described = fast_network(make_unet(), 100, 1, 1, 1.0)
    assert network is None
    assert "without onnxruntime (tried: 1.01 times as fast as PyTorch)" in described

    def fail(unet):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(fast, "OnnxNetwork", fail)
    network, described = fast_network(make_unet(), 100, 1, 1, 1.0)
    assert network is None
    assert "without onnxruntime (RuntimeError: no such instruction)" in described


def test_guided_sampling_is_compiled_for_both_halves(make_pipeline, compilation):
    pipe = make_pipeline(num_class_embeds=4)
    options = {"class_labels": [0, 2], "guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "pt"}
    plain = pipe(2, generators(0, 1), **options).images
    described = pipe.enable_fast_sampling(10**6, 1000, batch_size=2, guidance_scale=3.0)
    assert "compiled for batches of 4" in described
    torch.testing.assert_close(pipe(2, generators(0, 1), **options).images, plain, rtol=0, atol=1e-5)


def test_the_command_says_what_it_chose_and_makes_the_same_images(make_pipeline, tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--num_images", "3", "--steps", "3", "--batch_size", "2"]
    for name, options in (("plain", []), ("fast", ["--fast"])):
        main([*command, "--output_dir", str(tmp_path / name), *options])
    (described,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Fast sampling:")]
    assert described.startswith("Fast sampling: float32, because ")
    assert described.endswith("; not compiled (3 network calls are too few).")
    plain, quick = (np.asarray(Image.open(tmp_path / name / "grid.png")).astype(int) for name in ("plain", "fast"))
    assert abs(plain - quick).max() <= 1


def test_a_folder_says_in_which_precision_it_was_filled(make_pipeline, half_precision, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--steps", "2", "--output_dir", str(tmp_path / "out")]
    main([*command, "--num_images", "1", "--batch_size", "1", "--fast"])
    with pytest.raises(SystemExit, match="`dtype` was 'bfloat16' and is 'float32'"):
        main([*command, "--num_images", "2", "--batch_size", "1"])


# --- what is chosen ------------------------------------------------------------------------------------------------


def test_compilation_must_earn_its_time_back(make_unet, compilation):
    """At 1 s per call, 90 s of compilation that save a quarter of each pay twice over from 720 calls on."""

    def described(calls):
        return fast_network(make_unet(), 2, calls, 2, 1.0)[1]

    assert "compiled for batches of 2" in described(720)
    assert "to save 180 s of 719 network calls" in described(719)
    assert "too few" in described(99)


def test_a_compiler_that_fails_costs_nothing_but_the_compilation(make_pipeline, compilation, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler found")

    pipe = make_pipeline()
    monkeypatch.setattr(torch, "compile", fail)
    assert "not compiled (RuntimeError: no C++" in pipe.enable_fast_sampling(10**6, 1000, batch_size=2)
    assert pipe(2, generators(0, 1), 3, "pt").images.isfinite().all()


def test_a_cpu_that_gains_nothing_by_half_precision_stays_in_float32(make_unet, half_precision, monkeypatch):
    monkeypatch.setattr(fast, "cpu_has_bfloat16", lambda: False)
    assert sampling_dtype(make_unet())[0] == torch.float32


def test_batches_fit_the_memory(make_unet, monkeypatch):
    """Half of the memory may hold activations. (The paper's network needs 11.2 MiB per image; the rule says 16.)"""
    unet = make_unet(sample_size=32)
    per_image = 32 * 32 * 32 * 4 * 4  # 32 feature maps of 32×32 and 4 channels, in float32
    for images, expected in ((1000, 64), (64, 64), (63, 32), (1, 1), (0.5, 1)):
        total = int(2 * images * per_image)
        monkeypatch.setattr(psutil, "virtual_memory", lambda total=total: SimpleNamespace(total=total))
        assert fitting_batch_size(unet) == expected


# --- the network stays what it was ---------------------------------------------------------------------------------


def test_what_is_saved_is_the_network_itself(make_pipeline, half_precision, compilation, tmp_path):
    pipe = make_pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    assert "bfloat16" in (described := pipe.enable_fast_sampling(10**6, 1000, batch_size=2))
    assert "compiled for" in described
    pipe.save_pretrained(tmp_path)
    saved = DDPMPipelineCustom.from_pretrained(tmp_path).unet.state_dict()
    assert list(saved) == list(before)
    for name, value in before.items():
        assert saved[name].dtype == value.dtype == torch.float32
        assert torch.equal(saved[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "`num_images` is 0"),
        ({"num_images": 4, "batch_size": 2.5}, "`batch_size` is 2.5"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
    ],
)
def test_bad_jobs_are_refused(make_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline().enable_fast_sampling(**options)
