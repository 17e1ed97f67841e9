"""The pipeline: what it makes, what it takes, what it refuses; and that what it saves loads everywhere."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


@pytest.fixture
def make_pipeline(make_unet):
    def make(scheduler=None, **unet_options):
        pipeline = DDPMPipelineCustom(make_unet(**unet_options), scheduler or DDPMSchedulerCustom())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


# --- what it makes -------------------------------------------------------------------------------------------------


def test_same_seed_same_images_as_the_stock_pipeline(make_unet):
    images = []
    for pipeline in (DDPMPipelineCustom, DDPMPipeline):
        pipe = pipeline(make_unet(), DDPMScheduler(variance_type="fixed_large"))
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(2, generators(3)[0], 100, "np").images)  # positional, as stock allows
    np.testing.assert_allclose(*images, atol=1e-4)


def test_full_chain_is_the_default(make_pipeline):
    pipe = make_pipeline(DDPMSchedulerCustom(num_train_timesteps=12, beta_schedule="squaredcos_cap_v2"))
    assert pipe(trajectory_every=1).trajectory_timesteps == list(range(11, -1, -1))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_output_type_for_every_dtype(make_pipeline, channels, mode, dtype):
    pipe = make_pipeline(channels=channels).to(dtype=dtype)
    out = {o: pipe(2, generators(0, 1), 3, o).images for o in ("pil", "np", "pt", "latent")}
    assert [(i.mode, i.size) for i in out["pil"]] == [(mode, (8, 8))] * 2
    assert out["np"].shape == (2, 8, 8, channels)
    assert out["np"].dtype == np.float32
    assert out["pt"].shape == (2, channels, 8, 8)
    assert out["pt"].dtype == torch.float32
    np.testing.assert_array_equal(out["np"], out["pt"].permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close((out["latent"] / 2 + 0.5).clamp(0, 1), out["pt"])
    pil = np.stack([np.asarray(i).reshape(8, 8, channels) for i in out["pil"]])
    np.testing.assert_array_equal(pil, (out["np"] * 255).round().astype(np.uint8))


def test_many_channels_come_as_arrays(make_pipeline):
    pipe = make_pipeline(channels=7)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 7)
    with pytest.raises(ValueError, match="output_type.*7.*'np'"):
        pipe(num_inference_steps=2)


def test_rectangular_images(make_pipeline):
    assert make_pipeline(sample_size=(8, 16))(num_inference_steps=2).images[0].size == (16, 8)


def test_half_precision_network_keeps_the_trajectory_in_float32(make_pipeline):
    pipe = make_pipeline().to(dtype=torch.bfloat16)
    seen = []
    pipe(num_inference_steps=3, callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"].dtype) or k)
    assert seen == [torch.float32] * 3


def test_an_image_depends_on_its_generator_alone(make_pipeline):
    pipe = make_pipeline()
    together = pipe(3, generators(5, 6, 7), 20, "pt").images
    for i, seed in enumerate((5, 6, 7)):
        torch.testing.assert_close(pipe(1, generators(seed), 20, "pt").images[0], together[i], rtol=0, atol=1e-5)


def test_tuple_output_and_trajectories(make_pipeline):
    pipe = make_pipeline()
    assert len(pipe(2, num_inference_steps=3, return_dict=False)) == 1
    out = pipe(2, generators(0, 1), 10, "latent", trajectory_every=4)
    assert out.trajectory_timesteps == [600, 200, 0]
    assert out.trajectory.shape == out.trajectory_x_0.shape == (3, 2, 3, 8, 8)
    assert torch.equal(out.trajectory[-1], out.images)
    assert torch.equal(out.trajectory_x_0[-1], out.images)
    assert out.trajectory_x_0.abs().max() <= 1
    images, x_t, x_0, timesteps = pipe(2, generators(0, 1), 10, "latent", return_dict=False, trajectory_every=4)
    assert torch.equal(images, out.images)
    assert torch.equal(x_t, out.trajectory)
    assert torch.equal(x_0, out.trajectory_x_0)
    assert timesteps == out.trajectory_timesteps


def test_custom_timesteps_and_eta(make_pipeline):
    pipe = make_pipeline()
    out = pipe(timesteps=[999, 500, 20], trajectory_every=1, eta=0.0, generator=generators(0), output_type="np")
    assert out.trajectory_timesteps == [999, 500, 20]
    # With eta = 0 all randomness is in x_T.
    x_T = torch.randn(1, 3, 8, 8, generator=generators(0)[0])
    x = x_T
    pipe.scheduler.set_timesteps(timesteps=[999, 500, 20])
    for t in (999, 500, 20):
        x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x, ddim_eta=0.0).prev_sample
    np.testing.assert_allclose(out.images[0], (x / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0).detach(), atol=1e-5)


def test_callback_sees_every_step_and_can_change_the_latents(make_pipeline):
    pipe, steps = make_pipeline(), []

    def callback(p, i, t, tensors):
        assert p is pipe
        assert set(tensors) == {"latents", "pred_original_sample"}
        steps.append((i, int(t)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 4 else {}

    names = ["latents", "pred_original_sample"]
    out = pipe(1, None, 5, "latent", callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert steps == [(0, 800), (1, 600), (2, 400), (3, 200), (4, 0)]
    assert (out.images == 0).all()


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    ],
)
@pytest.mark.parametrize("learned", [False, True])
def test_any_stock_scheduler_swaps_in(make_pipeline, scheduler, learned):
    """Also for a network with learned variance, whose second half stock solvers have no use for."""
    variance_type = "learned_range" if learned else "fixed_small"
    pipe = make_pipeline(DDPMSchedulerCustom(variance_type=variance_type), out_channels=6 if learned else 3)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    out = pipe(2, generators(0, 1), 6, "np", trajectory_every=2)
    assert np.isfinite(out.images).all()
    assert 0.1 < out.images.mean() < 0.9
    assert len(out.trajectory) >= 3


@pytest.mark.parametrize(
    "scheduler",
    [DDPMSchedulerCustom, DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, EulerDiscreteScheduler],
)
def test_neither_a_call_nor_a_look_at_its_trajectory_changes_the_scheduler(make_pipeline, scheduler):
    pipe = make_pipeline(scheduler())
    pipe.scheduler.set_timesteps(7)
    before = pickle.dumps(vars(pipe.scheduler))
    planned = pipe.scheduler_on_trajectory(5).timesteps
    assert pipe(num_inference_steps=5, trajectory_every=1).trajectory_timesteps == [int(t) for t in planned]
    assert pickle.dumps(vars(pipe.scheduler)) == before


def test_stock_ddim_gives_the_images_of_our_eta_0(make_pipeline):
    pipe = make_pipeline(DDPMSchedulerCustom(clip_sample=False))
    ours = pipe(2, generators(0, 1), 20, "np", eta=0.0).images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    np.testing.assert_allclose(pipe(2, generators(0, 1), 20, "np").images, ours, atol=1e-4)


def test_learned_variance_networks_sample(make_pipeline):
    pipe = make_pipeline(DDPMSchedulerCustom(variance_type="learned_range"), out_channels=6)
    assert np.isfinite(pipe(2, None, 10, "np").images).all()


def test_progress_bar_counts_the_steps(make_unet, capsys):
    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom())(num_inference_steps=7)
    assert "7/7" in capsys.readouterr().err


# --- classes and guidance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
def test_guidance_extrapolates_the_prediction_alone(make_pipeline, learned):
    """out = null + w (conditional - null); the null label is the last one; the variance stays the conditional one."""
    variance_type = "learned_range" if learned else "fixed_small"
    pipe = make_pipeline(
        DDPMSchedulerCustom(variance_type=variance_type), out_channels=6 if learned else 3, num_class_embeds=5
    )
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor(500), torch.tensor([1, 3])
    with torch.no_grad():
        conditional, null = pipe.unet(x, t, labels).sample, pipe.unet(x, t, torch.tensor([4, 4])).sample
        actual = pipe._predict(pipe.unet, x, t, labels, 3.0)
    expected = torch.cat([null + 3 * (conditional - null), conditional], dim=1)[:, [0, 1, 2]]
    if learned:
        expected = torch.cat([expected, conditional[:, 3:]], dim=1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_guidance_1_is_off_and_0_is_unconditional(make_pipeline):
    pipe = make_pipeline(num_class_embeds=5)

    def run(label, w):
        return pipe(1, generators(0), 5, "np", class_labels=label, guidance_scale=w).images

    np.testing.assert_allclose(run(2, 0.0), run(4, 1.0), atol=1e-5)
    assert np.abs(run(2, 1.0) - run(2, 4.0)).max() > 1e-4
    assert np.abs(run(2, 1.0) - run(3, 1.0)).max() > 1e-4


def test_labels_may_be_one_or_one_per_image(make_pipeline):
    pipe = make_pipeline(num_class_embeds=5)
    images = [
        pipe(2, generators(0, 1), 4, "np", class_labels=labels).images
        for labels in (3, [3, 3], torch.tensor(3), torch.tensor([3, 3]))
    ]
    for other in images[1:]:
        np.testing.assert_array_equal(images[0], other)


# --- what it refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unet", "call", "message"),
    [
        ({}, {"batch_size": 0}, "batch_size.*0"),
        ({}, {"generator": [1, 2]}, "generator.*torch.Generator"),
        ({}, {"callback_on_step_end": 5}, "callback_on_step_end.*5"),
        ({}, {"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs.*'latents'"),
        ({}, {"guidance_scale": float("inf")}, "guidance_scale.*inf"),
        ({}, {"eta": "x"}, "eta.*'x'"),
        ({"num_class_embeds": 5}, {"class_labels": "cat"}, "class_labels.*'cat'"),
        ({"num_class_embeds": 5}, {"class_labels": []}, "class_labels.*0.*batch_size.*2"),
        ({"sample_size": 7}, {}, "sample_size.*7.*multiple of 2"),
        ({}, {"generator": 3}, "generator.*list of 3.*batch_size.*2"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps.*0"),
        ({}, {"num_inference_steps": 1001}, "num_inference_steps.*1001"),
        ({}, {"timesteps": [5, 900]}, "timesteps.*descend"),
        ({}, {"timesteps": [5, 1], "num_inference_steps": 2}, "both"),
        ({}, {"output_type": "jpg"}, "output_type.*'jpg'.*'pil'"),
        ({}, {"eta": 2.0}, "eta.*2.0"),
        ({}, {"class_labels": 1}, "unconditional"),
        ({}, {"guidance_scale": 2.0}, "guidance_scale.*2.0.*unconditional"),
        ({}, {"trajectory_every": 0}, "trajectory_every.*0"),
        ({}, {"callback_on_step_end_tensor_inputs": ["noise"]}, "noise.*latents"),
        ({"num_class_embeds": 5}, {}, "class_labels.*missing.*0 to 4"),
        ({"num_class_embeds": 5}, {"class_labels": 5}, "class_labels.*5.*0 and 4"),
        ({"num_class_embeds": 5}, {"class_labels": [0, -1]}, "class_labels.*-1"),
        ({"num_class_embeds": 5}, {"class_labels": [0, 1, 2]}, "class_labels.*3.*batch_size.*2"),
        ({"num_class_embeds": 5}, {"class_labels": 0.5}, "class_labels.*integers"),
        ({"num_class_embeds": 5}, {"class_labels": 0, "guidance_scale": -1.0}, "guidance_scale.*-1"),
    ],
)
def test_bad_calls_are_refused_before_the_network_runs(make_pipeline, unet, call, message, monkeypatch):
    pipe = make_pipeline(**unet)
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("the network ran"))
    if isinstance(call.get("generator"), int):
        call = {"generator": generators(*range(call["generator"]))}
    with pytest.raises(ValueError, match=message):
        pipe(**{"batch_size": 2, **call})


def test_networks_that_do_not_fit_are_refused(make_unet):
    with pytest.raises(ValueError, match="3 input channels and 5 output channels"):
        DDPMPipelineCustom(make_unet(3, 5), DDPMSchedulerCustom())
    with pytest.raises(ValueError, match="'fixed_small'.*need 3"):
        DDPMPipelineCustom(make_unet(3, 6), DDPMSchedulerCustom())
    with pytest.raises(ValueError, match="'learned_range'.*need 6"):
        DDPMPipelineCustom(make_unet(3, 3), DDPMSchedulerCustom(variance_type="learned_range"))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
@pytest.mark.parametrize("steps", [-3, 0, 1001, 2.5])
def test_bad_numbers_of_steps_are_refused_for_any_scheduler(make_pipeline, scheduler, steps):
    with pytest.raises(ValueError, match=f"num_inference_steps.*{steps}.*1 to 1000"):
        make_pipeline(scheduler())(num_inference_steps=steps)


def test_parts_of_a_pipeline_load(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    assert DDPMPipelineCustom.from_pretrained(tmp_path, unet=None).unet is None
    with pytest.raises(TypeError, match="scheduler"):
        DDPMPipelineCustom(make_pipeline().unet, make_pipeline().unet)


def test_non_finite_images_cause_a_warning(make_pipeline):
    pipe = make_pipeline()
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN.*bfloat16"):
        pipe(num_inference_steps=2, output_type="np")


def test_eta_and_timesteps_are_refused_for_schedulers_without_them(make_pipeline):
    pipe = make_pipeline(DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="eta.*DPMSolverMultistepScheduler"):
        pipe(num_inference_steps=3, eta=0.5)
    pipe = make_pipeline(DDIMScheduler())
    with pytest.raises(ValueError, match="timesteps.*DDIMScheduler"):
        pipe(timesteps=[5, 1])


# --- saving and loading --------------------------------------------------------------------------------------------

LOADERS = {
    "package": lambda folder: DDPMPipelineCustom.from_pretrained(folder),
    "stock pipeline": lambda folder: DDPMPipeline.from_pretrained(folder),
    "stock loader": lambda folder: DiffusionPipeline.from_pretrained(folder),
    "remote code": lambda folder: DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(folder), trust_remote_code=True
    ),
}


@pytest.mark.parametrize("first", LOADERS)
@pytest.mark.parametrize("second", LOADERS)
def test_saved_repositories_load_every_way_and_again(make_pipeline, tmp_path, first, second):
    pipe = make_pipeline(DDPMSchedulerCustom(timestep_spacing="linspace"))
    expected = pipe(1, generators(0), 10, "np").images
    pipe.save_pretrained(tmp_path / "one")
    again = LOADERS[first](tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    if first.startswith("stock"):  # saved by stock diffusers, without our code: this package still loads it
        second = "package"
    last = LOADERS[second](tmp_path / "two")
    for loaded in (again, last):
        loaded.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(loaded(1, generators(0)[0], 10, "np").images, expected, atol=1e-3)
    for name, loader in ((first, again), (second, last)):
        ours = not name.startswith("stock")
        assert type(loader.scheduler).__name__ == ("DDPMSchedulerCustom" if ours else "DDPMScheduler")


def test_saved_repository_holds_safetensors_and_no_path_of_this_machine(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "one")
    DDPMPipelineCustom.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    files = {p.relative_to(tmp_path / "two").as_posix() for p in (tmp_path / "two").rglob("*") if p.is_file()}
    assert files == {
        "README.md",
        "model_index.json",
        "pipeline.py",
        "scheduling_ddpm_custom.py",
        "ddpm_fast_network.py",
        "ddpm_few_steps.py",
        "ddpm_labels.py",
        "ddpm_repository.py",
        "ddpm_process.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    }
    for file in [*(tmp_path / "two").rglob("*.json"), tmp_path / "two" / "README.md"]:
        assert str(tmp_path) not in file.read_text("utf-8")
    index = json.loads((tmp_path / "two" / "model_index.json").read_text("utf-8"))
    assert index["_class_name"] == "DDPMPipeline"
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]


def test_remote_code_needs_nothing_of_ours(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    script = f"""
import sys, torch
sys.modules["ddpm_hf"] = None  # not installed
from diffusers import DiffusionPipeline
folder = {str(tmp_path / "model")!r}
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert type(pipe).__name__ == "DDPMPipelineCustom"
assert type(pipe.scheduler).__name__ == "DDPMSchedulerCustom"
try:
    pipe.enable_fast_sampling()
except ImportError as error:
    print(error)
pipe.use_fast_network(torch.bfloat16)
print(pipe(1, [torch.Generator().manual_seed(0)], 3, "np").images.shape)
"""
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "pip install ddpm-hf, or choose yourself, as in pipe.use_fast_network(torch.bfloat16)" in done.stdout
    assert "(1, 8, 8, 3)" in done.stdout


def test_stock_repositories_load(make_unet, tmp_path):
    stock = DDPMPipeline(make_unet(), DDPMScheduler(variance_type="fixed_large", beta_schedule="sigmoid"))
    stock.save_pretrained(tmp_path)
    pipe = DDPMPipelineCustom.from_pretrained(tmp_path)
    assert isinstance(pipe.scheduler, DDPMSchedulerCustom)
    assert pipe.scheduler.config.variance_type == "fixed_large"
    assert pipe.scheduler.config.beta_schedule == "sigmoid"


def test_a_scheduler_that_the_caller_passes_stays(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    assert type(DDPMPipelineCustom.from_pretrained(tmp_path, scheduler=DDIMScheduler()).scheduler) is DDIMScheduler


def test_threads_that_share_a_pipeline_get_the_images_that_they_get_alone(make_unet):
    """Each call follows a trajectory of its own, whatever others do with the same scheduler meanwhile."""
    from concurrent.futures import ThreadPoolExecutor

    pipe = DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom())
    pipe.set_progress_bar_config(disable=True)
    before = pipe.scheduler.timesteps.clone()

    def call(i):
        options = {"num_inference_steps": 5 + 3 * (i % 5), "eta": (i % 3) / 2, "output_type": "pt"}
        return pipe(1, torch.Generator().manual_seed(i), **options).images

    alone = [call(i) for i in range(20)]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(call, range(20)))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert torch.equal(pipe.scheduler.timesteps, before)


@pytest.mark.parametrize("scheduler_type", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, PNDMScheduler])
def test_a_swapped_scheduler_keeps_nothing_of_a_call(make_unet, scheduler_type):
    pipe = DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom())
    pipe.scheduler = scheduler_type.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def call(steps):
        return pipe(1, torch.Generator().manual_seed(0), steps, "pt").images

    first = call(6)
    call(9)
    torch.testing.assert_close(call(6), first)


def test_a_callback_can_interrupt(make_unet):
    pipe = DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom())
    pipe.set_progress_bar_config(disable=True)
    seen = []

    def stop(pipeline, i, t, tensors):
        seen.append(i)
        pipeline._interrupt = i == 2
        return tensors

    assert pipe(num_inference_steps=10, callback_on_step_end=stop, output_type="pt").images.isfinite().all()
    assert seen == [0, 1, 2]
    assert len(pipe(num_inference_steps=4, output_type="pt").images) == 1  # the next call is not interrupted
