"""A network's twin: the same images up to the precision it names, of a network that stays what it was."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.training_utils import EMAModel
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.fixture
def make_pipeline(make_unet):
    def make(**unet_options):
        pipeline = DDPMPipelineCustom(make_unet(**unet_options), DDPMSchedulerCustom(timestep_spacing="trailing"))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.mark.parametrize("solver_order", [1, 2])
def test_half_precision_keeps_a_float32_trajectory_near_the_exact_one(make_pipeline, solver_order):
    pipe = make_pipeline()
    options = {"num_inference_steps": 10, "output_type": "latent", "solver_order": solver_order, "trajectory_every": 1}
    plain = pipe(2, generators(0, 1), **options)
    pipe.use_fast_network(torch.bfloat16)
    assert pipe.sampling_dtype == torch.bfloat16
    fast = pipe(2, generators(0, 1), **options)
    assert fast.images.dtype == torch.float32
    assert not torch.equal(fast.images, plain.images)
    rounded = fast.trajectory.bfloat16().float()
    assert (fast.trajectory != rounded).float().mean() > 0.9  # else x_t itself was rounded on the way
    torch.testing.assert_close(fast.images, plain.images, rtol=0, atol=0.05)
    pipe.disable_fast_sampling()
    assert torch.equal(pipe(2, generators(0, 1), **options).images, plain.images)


# --- the network stays what it was ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["step", "ema", "convert", "replace"])
def test_a_twin_of_outdated_weights_is_refused(make_pipeline, make_unet, change):
    pipe = make_pipeline()
    pipe.use_fast_network(torch.bfloat16)
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
    pipe.use_fast_network(torch.bfloat16)
    pipe(1, num_inference_steps=2)


def test_offloaded_networks_are_refused(make_pipeline):
    pipe = make_pipeline()
    add_hook_to_module(pipe.unet, ModelHook())
    for enable in (pipe.enable_fast_sampling, lambda: pipe.use_fast_network(torch.bfloat16)):
        with pytest.raises(ValueError, match="offloading"):
            enable()


# --- nothing waits for the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver_order", [1, 2])
def test_network_and_update_are_one_graph(make_unet, solver_order):
    """No value of a tensor is read: the whole step can be compiled, or captured in a CUDA graph."""
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
    """Counts the values of computed tensors that Python reads; timesteps on the CPU are not computed."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        looks = function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += looks and arguments[0].dtype != torch.int64
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("fast", [False, True])
def test_no_step_reads_a_value_of_a_tensor(make_pipeline, fast):
    """Before the first step and after the last there are some: are all images finite?"""
    pipe = make_pipeline()
    if fast:
        pipe.use_fast_network(torch.bfloat16)
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
