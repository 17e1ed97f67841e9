"""Sampling on a pretended GPU: the numbers of a CPU, no mix of devices, and no wait between two steps."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion import scheduling_ddpm_custom
from ddpm_hf.diffusion.ddpm_few_steps import Calibration, fingerprint
from support.models import tiny_unet
from support.pretend_gpu import DeviceMix, PretendGpu

STEPS = 6


def pipe(outputs=3, classes=None, scheduler=None, **options):
    made = DDPMPipelineCustom(
        tiny_unet(out_channels=outputs, num_class_embeds=classes), scheduler or DDPMSchedulerCustom(**options)
    )
    made.set_progress_bar_config(disable=True)
    return made


def calibrated(variance_type):
    scheduler = DDPMSchedulerCustom()
    table = torch.full((1000,), 0.01, dtype=torch.float64)
    scheduler.set_calibration(Calibration(*[table] * 4, 16, fingerprint(scheduler.process, scheduler.config)))
    return DDPMSchedulerCustom.from_config(scheduler.config, variance_type=variance_type)


CASES = {
    **{v: (lambda v=v: pipe(variance_type=v), {}) for v in ("fixed_small", "fixed_large_log")},
    **{v: (lambda v=v: pipe(6, variance_type=v), {}) for v in ("learned", "learned_range")},
    "optimal": (lambda: pipe(scheduler=calibrated("optimal")), {"eta": 0.0}),
    "optimal timesteps": (lambda: pipe(scheduler=calibrated("fixed_small")), {"timesteps": "optimal"}),
    "eta 0": (pipe, {"eta": 0.0}),
    "eta 0.5": (pipe, {"eta": 0.5}),
    "second order": (pipe, {"solver_order": 2, "eta": 0.0}),
    "v": (lambda: pipe(prediction_type="v_prediction", rescale_betas_zero_snr=True), {}),
    "thresholding": (lambda: pipe(thresholding=True), {}),
    "guided": (lambda: pipe(classes=5), {"class_labels": [1, 2], "guidance_scale": 2.0}),
    "DDIM": (lambda: pipe(scheduler=DDIMScheduler()), {}),
    "DPM-Solver++": (lambda: pipe(scheduler=DPMSolverMultistepScheduler()), {}),
}
OF_DIFFUSERS = ("DDIM", "DPM-Solver++")


def sample(case, gpu=None):
    """Images of two seeds on the CPU, and what was counted when each step had ended."""
    make, options = CASES[case]
    counts = []

    def count(pipeline, i, t, tensors):
        counts.append(gpu and gpu.waits.total())
        return tensors

    images = make().to(gpu.device if gpu else "cpu")(
        2, [torch.Generator().manual_seed(i) for i in range(2)], STEPS, "latent", callback_on_step_end=count, **options
    )
    return images[0].cpu(), counts


@pytest.mark.parametrize("case", CASES)
def test_a_gpu_samples_what_a_cpu_samples_without_waiting_between_steps(case):
    if case == "thresholding" and torch.__version__ < "2.12":
        pytest.skip("torch.quantile waits before torch 2.12")
    expected, _ = sample(case)
    with PretendGpu() as gpu:
        actual, counts = sample(case, gpu)
    assert torch.equal(actual, expected)
    assert len(counts) == STEPS
    assert len(set(counts)) == 1, gpu.waits
    assert not gpu.unsafe
    assert not gpu.frozen or case in OF_DIFFUSERS  # ours could be captured in a CUDA graph


@pytest.mark.parametrize("case", CASES)
def test_apples_gpu_samples_what_a_cpu_samples_and_never_meets_float64(case):
    if case == "DPM-Solver++":
        pytest.skip("diffusers' own scheduler keeps float64 tables")
    expected, _ = sample(case)
    with PretendGpu("mps") as gpu:
        actual, _ = sample(case, gpu)
    assert torch.equal(actual, expected)
    assert not gpu.unsafe


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range", "optimal"])
@pytest.mark.parametrize("kind", ["int", "on the CPU", "on the GPU", "one per image"])
def test_a_step_by_a_timestep_wherever_it_lies_waits_in_the_first_step_at_most(kind, variance_type):
    channels = 6 if variance_type == "learned_range" else 3
    waits = []
    with PretendGpu() as gpu:
        scheduler = calibrated(variance_type)
        scheduler.set_timesteps(8, device="cuda" if kind == "on the GPU" else None)
        at = {
            "int": lambda t: int(t),
            "on the CPU": lambda t: t,
            "on the GPU": lambda t: t,
            "one per image": lambda t: torch.full((2,), int(t), device="cuda"),
        }[kind]
        x, x_0 = torch.randn(2, 3, 8, 8, device="cuda"), None
        for t in scheduler.timesteps:
            output = torch.randn(2, channels, 8, 8, device="cuda")
            x, x_0 = scheduler.step(output, at(t), x, ddim_eta=0.5, previous_x_0=x_0, return_dict=False)
            waits.append(gpu.waits.total())
    assert len(set(waits)) == 1, gpu.waits
    assert x.shape == (2, 3, 8, 8)


def test_the_cpu_queues_some_steps_and_no_more():
    """The noise of each queued step lies in pinned memory."""
    with PretendGpu() as gpu:
        pipe().to("cuda")(1, torch.Generator(), 50, "latent")
    assert 2 <= gpu.furthest_ahead <= 10


def test_a_call_waits_for_its_noise_and_to_see_whether_it_is_finite():
    with PretendGpu() as gpu:
        on_gpu = pipe(classes=5).to("cuda")
        gpu.waits.clear()
        on_gpu(2, [torch.Generator(), torch.Generator()], 4, "latent", class_labels=[1, 2])
    assert gpu.waits.total() <= 1, gpu.waits


# --- these tests can fail --------------------------------------------------------------------------------------------


@pytest.fixture
def plant(monkeypatch):
    """Something wrong in each step."""

    def put(wrong):
        limit = DDPMSchedulerCustom.limit_x_0
        monkeypatch.setattr(DDPMSchedulerCustom, "limit_x_0", lambda self, x: wrong(limit(self, x)))

    return put


def test_a_planted_item_is_found(plant):
    plant(lambda x: x * (1 if x.max().item() < 1e9 else 0))
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        test_a_gpu_samples_what_a_cpu_samples_without_waiting_between_steps("fixed_small")


def test_a_planted_tensor_of_the_cpu_is_found(plant):
    plant(lambda x: x * torch.ones(8))
    with pytest.raises(DeviceMix, match=r"operands on cuda:0 and, of shape \(8,\), on the CPU"):
        test_a_gpu_samples_what_a_cpu_samples_without_waiting_between_steps("fixed_small")


def test_a_planted_float64_is_found_on_apples_gpu(plant):
    plant(lambda x: (x.double() * 1).float())
    with pytest.raises(TypeError, match="MPS framework doesn't support float64"):
        test_apples_gpu_samples_what_a_cpu_samples_and_never_meets_float64("fixed_small")


def test_planted_noise_that_is_not_pinned_is_found(monkeypatch):
    def unpinned(shape, generators, device, dtype):
        return torch.cat([torch.randn(1, *shape[1:], generator=g) for g in generators]).to(device, non_blocking=True)

    monkeypatch.setattr(scheduling_ddpm_custom, "draw_noise", unpinned)
    with pytest.raises(AssertionError, match="not pinned"):
        test_a_gpu_samples_what_a_cpu_samples_without_waiting_between_steps("fixed_small")
