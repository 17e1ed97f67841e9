"""Samples of many images: which images, whatever process makes them, and in whatever batches."""

import pytest
import torch

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.sampling.generate import sample_pixels
from support.runs import SUPPORT, TWO_PROCESSES, TWO_PROCESSES_ENV, run


@pytest.fixture
def make_pipe(make_unet):
    def make(channels=1, dtype=torch.float32, **options):
        return DDPMPipelineCustom(
            make_unet(channels=channels, **options).to(dtype), DDPMSchedulerCustom(timestep_spacing="linspace")
        )

    return make


def count_calls(network):
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("channels", "dtype"), [(1, "float32"), (2, "float32"), (3, "bfloat16"), (5, "float32")])
def test_pixels_are_those_of_the_pipeline_and_of_seed_and_label_i(channels, dtype, make_pipe):
    pipe = make_pipe(channels, getattr(torch, dtype), num_class_embeds=4)
    options = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0}
    made = list(sample_pixels(pipe, 5, 10, 3, class_labels=[0, 2], show_progress=False, **options))
    assert [images for images, _ in made] == [range(3), range(3, 5)]
    for images, pixels in made:
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (len(images), channels, 8, 8))
        seeds, labels = [torch.Generator().manual_seed(10 + i) for i in images], [[0, 2][i % 2] for i in images]
        direct = pipe(len(images), seeds, class_labels=labels, output_type="np", **options).images
        expected = (torch.from_numpy(direct) * 255).round().permute(0, 3, 1, 2)
        assert torch.equal(pixels.float(), expected)


def test_skipped_batches_are_not_sampled(make_pipe):
    pipe = make_pipe()
    calls = count_calls(pipe.unet)
    made = list(sample_pixels(pipe, 7, 0, 2, skip={0, 2}, show_progress=False, num_inference_steps=3))
    assert [images for images, _ in made] == [range(2, 4), range(6, 7)]
    assert len(calls) == 2 * 3


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 0, 2), {}, "num_images"),
        ((4, 0, 0), {}, "batch_size"),
        ((4, 2**63 - 3, 2), {}, "seed"),
        ((4, 0, 2), {"num_inference_steps": 2000}, "num_inference_steps.*2000"),
        ((4, 0, 2), {"class_labels": [1]}, "unconditional"),
    ],
)
def test_bad_arguments_are_refused_before_any_network_call(arguments, options, message, make_pipe):
    with pytest.raises(ValueError, match=message):
        sample_pixels(make_pipe(), *arguments, **options)


@pytest.mark.parametrize("num_images", [1, 7])
def test_in_lockstep_all_processes_call_the_network_equally_often_and_all_get_all_images(
    num_images, make_pipe, tmp_path
):
    script = [str(SUPPORT / "lockstep.py"), str(num_images), str(tmp_path)]
    done = run([*TWO_PROCESSES, *script], env=TWO_PROCESSES_ENV)
    assert done.returncode == 0, done.stderr
    (first, calls), (second, other_calls) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert calls == other_calls == {1: 1, 7: 2}[num_images] * 3
    assert torch.equal(first, second)
    pipe = make_pipe(3, num_class_embeds=4)
    options = {"class_labels": [0, 2], "num_inference_steps": 3}
    alone = torch.cat([p for _, p in sample_pixels(pipe, num_images, 7, 2, show_progress=False, **options)])
    assert first.shape == alone.shape
    assert (first.int() - alone.int()).abs().max() <= 1  # rounding depends on the batch


def test_images_with_nan_are_refused_by_their_index(make_pipe):
    pipe = make_pipe()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.warns(UserWarning, match="NaN"), pytest.raises(ValueError, match=r"image 0 holds NaN.*torch\.float32"):
        list(sample_pixels(pipe, 2, 0, 2, num_inference_steps=2, show_progress=False))
