"""Fast sampling: the same images up to the precision it names, of a network that stays what it was."""

import functools
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.cli import main
from ddpm_hf.diffusion import ddpm_fast_network
from ddpm_hf.diffusion.ddpm_fast_network import FastNetwork
from ddpm_hf.sampling.batch_size import fitting_batch_size


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
    monkeypatch.setattr(ddpm_fast_network, "HALF_PRECISION_PARAMETERS", 0)
    monkeypatch.setattr(ddpm_fast_network, "cpu_has_bfloat16", lambda: True)


@pytest.fixture
def compilation(monkeypatch):
    """A compiler that traces as the real one does and generates no code; what it makes takes a tenth of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(_compile, torch.compile))
    times = iter([1.0, 0.1] * 10)
    monkeypatch.setattr(FastNetwork, "_seconds_per_call", lambda self: next(times))
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


@pytest.mark.parametrize("solver_order", [1, 2])
def test_half_precision_keeps_a_float32_trajectory_near_the_exact_one(make_pipeline, half_precision, solver_order):
    pipe = make_pipeline()
    options = {"num_inference_steps": 10, "output_type": "latent", "solver_order": solver_order, "trajectory_every": 1}
    plain = pipe(2, generators(0, 1), **options)
    assert "bfloat16" in pipe.enable_fast_sampling(num_images=2, num_inference_steps=10)
    fast = pipe(2, generators(0, 1), **options)
    assert fast.images.dtype == torch.float32
    assert not torch.equal(fast.images, plain.images)
    rounded = fast.trajectory.bfloat16().float()
    assert (fast.trajectory != rounded).float().mean() > 0.9  # else x_t itself was rounded on the way
    torch.testing.assert_close(fast.images, plain.images, rtol=0, atol=0.05)
    pipe.disable_fast_sampling()
    assert torch.equal(pipe(2, generators(0, 1), **options).images, plain.images)


def test_compiled_network_gives_the_same_images_at_every_batch_size(make_pipeline, compilation):
    pipe = make_pipeline()
    plain = [pipe(n, generators(*range(n)), 5, "pt").images for n in (2, 3)]
    assert "compiled for batches of 2 (10.00 times" in pipe.enable_fast_sampling(10**6, 1000, batch_size=2)
    for n, images in zip((2, 3), plain, strict=True):  # the last batch of a job is seldom a full one
        torch.testing.assert_close(pipe(n, generators(*range(n)), 5, "pt").images, images, rtol=0, atol=1e-5)


def test_one_compilation_serves_the_trial_and_the_job(make_pipeline, half_precision, monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", functools.partial(_compile, torch.compile, graphs=graphs))
    times = iter([1.0, 0.1])
    measure = FastNetwork._seconds_per_call
    monkeypatch.setattr(FastNetwork, "_seconds_per_call", lambda self: (measure(self), next(times))[1])
    pipe = make_pipeline(num_class_embeds=4)
    pipe.enable_fast_sampling(10**6, 1000, batch_size=2)
    pipe(2, generators(0, 1), 3, class_labels=1)
    assert len(graphs) == 1
    torch.compiler.reset()


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
    assert "Fast sampling: float32 (0.0 M parameters); not compiled (3 network calls are too few)." in (
        capsys.readouterr().out
    )
    plain, fast = (np.asarray(Image.open(tmp_path / name / "grid.png")).astype(int) for name in ("plain", "fast"))
    assert abs(plain - fast).max() <= 1


def test_a_folder_says_in_which_precision_it_was_filled(make_pipeline, half_precision, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--steps", "2", "--output_dir", str(tmp_path / "out")]
    main([*command, "--num_images", "1", "--batch_size", "1", "--fast"])
    with pytest.raises(SystemExit, match="`dtype` was 'bfloat16' and is 'float32'"):
        main([*command, "--num_images", "2", "--batch_size", "1"])


# --- what is chosen ------------------------------------------------------------------------------------------------


def test_compilation_must_earn_its_time_back(make_unet, compilation):
    """At 1 s per call, 90 s of compilation that save a quarter of each pay twice over from 720 calls on."""
    assert "360 network calls" not in FastNetwork(make_unet(), 2, 720).description
    assert "to save 180 s of 719 network calls" in FastNetwork(make_unet(), 2, 719).description
    assert "too few" in FastNetwork(make_unet(), 2, 99).description


def test_a_compiler_that_fails_costs_nothing_but_the_compilation(make_pipeline, compilation, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no C++ compiler found")

    pipe = make_pipeline()
    monkeypatch.setattr(torch, "compile", fail)
    assert "not compiled (RuntimeError: no C++" in pipe.enable_fast_sampling(10**6, 1000, batch_size=2)
    assert pipe(2, generators(0, 1), 3, "pt").images.isfinite().all()


def test_a_cpu_that_gains_nothing_by_half_precision_stays_in_float32(make_unet, half_precision, monkeypatch):
    monkeypatch.setattr(ddpm_fast_network, "cpu_has_bfloat16", lambda: False)
    assert FastNetwork(make_unet(), 1, 1).dtype == torch.float32


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


@pytest.mark.parametrize("change", ["step", "ema", "convert", "replace"])
def test_a_twin_of_other_weights_is_refused(make_pipeline, make_unet, half_precision, change):
    pipe = make_pipeline()
    pipe.enable_fast_sampling(2, 5)
    if change == "step":
        pipe.unet(torch.randn(1, 3, 8, 8), 5).sample.sum().backward()
        torch.optim.SGD(pipe.unet.parameters(), 0.1).step()
    elif change == "ema":
        EMAModel([p * 1.01 for p in pipe.unet.parameters()]).copy_to(pipe.unet.parameters())
    elif change == "convert":
        pipe.to(dtype=torch.bfloat16)
    else:
        pipe.unet = make_unet()
    with pytest.raises(ValueError, match="weights changed after `enable_fast_sampling`: call it again"):
        pipe(1, num_inference_steps=2)
    pipe.enable_fast_sampling(2, 5)
    pipe(1, num_inference_steps=2)


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


def test_offloaded_networks_are_refused(make_pipeline):
    pipe = make_pipeline()
    add_hook_to_module(pipe.unet, ModelHook())
    with pytest.raises(ValueError, match="offloading"):
        pipe.enable_fast_sampling()


# --- nothing waits for the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver_order", [1, 2])
def test_network_and_update_are_one_graph(make_unet, solver_order):
    """No value of a tensor is looked at: the whole step can be compiled, or captured in a CUDA graph."""
    unet, scheduler = make_unet(), DDPMSchedulerCustom()
    scheduler.set_timesteps(10)

    @torch.no_grad()
    def step(x_t, t, noise, previous_x_0):
        output = unet(x_t, t, return_dict=False)[0]
        return scheduler.step(output, t, x_t, None, False, variance_noise=noise, previous_x_0=previous_x_0)

    x_t, noise, previous = torch.randn(3, 2, 3, 8, 8)
    arguments = (x_t, torch.tensor(500), noise, previous if solver_order == 2 else None)
    expected = step(*arguments)
    torch.compiler.reset()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


class Lookups(TorchDispatchMode):
    """Counts the values of computed tensors that Python looks at; a timestep on the CPU is none."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        looks = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += looks and arguments[0].dtype != torch.int64
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("fast", [False, True])
def test_no_step_looks_at_a_value(make_pipeline, half_precision, fast):
    """Before the first step and after the last there are some: are all images finite?"""
    pipe = make_pipeline()
    if fast:
        pipe.enable_fast_sampling(2, 20)
    counts = []
    for steps in (5, 20):
        with Lookups() as lookups:
            pipe(2, generators(0, 1), steps, "pt", solver_order=2)
        counts.append(lookups.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_thousand_steps_on_a_gpu_wait_for_nothing(make_pipeline, on_gpu):
    pipe = make_pipeline().to("cuda")
    seeds = [torch.Generator("cuda" if on_gpu else "cpu").manual_seed(i) for i in range(2)]

    def watch(pipe, i, t, tensors):
        torch.cuda.set_sync_debug_mode("error" if i < 998 else "default")
        return tensors

    pipe(2, seeds, 1000, "pt", callback_on_step_end=watch)
