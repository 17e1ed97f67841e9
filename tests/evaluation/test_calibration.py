"""Calibration against closed forms, what follows from it for few steps, and the command."""

import math
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.evaluation.calibration import calibrate, expected_rate, recommended_steps, steps_table
from support.oracle import OracleUNet, calibrated_scheduler, exact_x_0_error, gaussian_images, oracle_pipeline

# --- measuring ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_calibration_of_the_oracle_is_the_closed_form(prediction_type):
    c, n = 0.05, 400
    pipe = oracle_pipeline(
        c, num_train_timesteps=40, beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type
    )
    calibration = calibrate(pipe, gaussian_images(c, n), batch_size=150, show_progress=False)
    process = pipe.scheduler.process
    second_moment = (1 - process.alphas_cumprod) / (c * process.alphas_cumprod + 1 - process.alphas_cumprod)
    for value, error, exact in (
        (calibration.x_0_error, calibration.x_0_error_standard_error, exact_x_0_error(process, c)),
        (calibration.eps_second_moment, calibration.eps_second_moment_standard_error, second_moment),
    ):
        assert ((value - exact).abs() < 4.5 * error + 1e-5).all()  # 1e-5: images are rounded to 256 levels
        # The mean square of 64 independent Gaussians has a relative standard deviation of sqrt(2/64).
        torch.testing.assert_close(error / exact, torch.full_like(exact, (2 / 64 / n) ** 0.5), rtol=0.15, atol=0)
    assert calibration.num_images == n


def test_calibration_sees_the_x_0_that_sampling_uses():
    """A network that always predicts ε = 0 overshoots; with clipping, the error is bounded by the range of images."""
    images = gaussian_images(0.05, 20)
    pipe = oracle_pipeline(0.05, num_train_timesteps=30, beta_schedule="squaredcos_cap_v2", clip_sample=True)
    pipe.unet.slope.zero_()
    assert calibrate(pipe, images, show_progress=False).x_0_error.max() < 4
    pipe = oracle_pipeline(0.05, num_train_timesteps=30, beta_schedule="squaredcos_cap_v2")
    pipe.unet.slope.zero_()
    assert calibrate(pipe, images, show_progress=False).x_0_error.max() > 1000


def test_batches_and_variance_channels_change_nothing():
    images = gaussian_images(0.1, 30)
    options = {"num_train_timesteps": 10, "beta_schedule": "squaredcos_cap_v2"}
    one = calibrate(oracle_pipeline(0.1, **options), images, num_images=20, seed=3, show_progress=False)
    for pipe, batch_size in (
        (oracle_pipeline(0.1, **options), 7),
        (oracle_pipeline(0.1, raw_variance=0.3, variance_type="learned_range", **options), 20),
    ):
        other = calibrate(pipe, images, num_images=20, seed=3, batch_size=batch_size, show_progress=False)
        torch.testing.assert_close(other.x_0_error, one.x_0_error, rtol=1e-6, atol=0)
    assert not torch.equal(
        calibrate(oracle_pipeline(0.1, **options), images, num_images=20, seed=4, show_progress=False).x_0_error,
        one.x_0_error,
    )


def test_dropout_is_off_during_calibration_and_nan_is_refused(make_unet):
    """Dropout is off while a network is measured; NaN is no calibration."""
    scheduler = DDPMSchedulerCustom(4, beta_schedule="squaredcos_cap_v2")
    pipe = DDPMPipelineCustom(make_unet(channels=1, dropout=0.5).train(), scheduler)
    first, second = (calibrate(pipe, gaussian_images(0.1, 16), show_progress=False).x_0_error for _ in range(2))
    assert torch.equal(first, second)
    assert pipe.unet.training
    torch.nn.init.constant_(pipe.unet.conv_out.bias, math.nan)
    with pytest.raises(ValueError, match="t = 0 holds NaN"):
        calibrate(pipe, gaussian_images(0.1, 16), show_progress=False)
    pipe.scheduler = DDPMSchedulerCustom(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero SNR"):
        calibrate(pipe, gaussian_images(0.1, 16), show_progress=False)


# --- what follows from it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [[999, 0], [999, 500, 0], [800, 700, 10, 3], list(range(999, -1, -1))])
def test_every_trajectory_costs_the_information_that_gaussian_data_holds(timesteps):
    """Independent Gaussian pixels make every reverse step Gaussian: the terms then sum to I(x_0; x_first … x_last)."""
    c = 0.3
    scheduler = calibrated_scheduler(c)
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    information = 0.5 * torch.log2((1 + c * snr[timesteps[-1]]) / (1 + c * snr[timesteps[0]]))
    assert expected_rate(scheduler, timesteps) == pytest.approx(float(information), rel=1e-6)


def test_more_steps_cost_less_and_the_best_ones_least():
    scheduler = calibrated_scheduler(0.2)
    # Half of the pixels vary little, half much: unlike those of one Gaussian, they are worth more steps.
    mixed = (exact_x_0_error(scheduler.process, 0.005) + exact_x_0_error(scheduler.process, 0.5)) / 2
    scheduler.calibration.x_0_error.copy_(mixed)
    rates = []
    for K in (5, 10, 25, 100, 1000):
        scheduler.set_timesteps(K, spacing="linspace")
        even, best = scheduler.timesteps.tolist(), scheduler.optimal_timesteps(K)
        assert len(set(best)) == K
        assert (best[0], best[-1]) == (999, 0)
        rates.append(expected_rate(scheduler, best))
        assert rates[-1] <= expected_rate(scheduler, even)
        for variance_type in ("fixed_small", "fixed_large"):
            assert expected_rate(scheduler, best) < expected_rate(scheduler, best, variance_type)
    assert rates == sorted(rates, reverse=True)


def test_fewest_steps_that_model_the_data_as_well():
    scheduler = calibrated_scheduler(0.2)
    mixed = (exact_x_0_error(scheduler.process, 0.005) + exact_x_0_error(scheduler.process, 0.5)) / 2
    scheduler.calibration.x_0_error.copy_(mixed)
    enough = expected_rate(scheduler, range(999, -1, -1), "fixed_small")
    K = recommended_steps(scheduler)
    assert expected_rate(scheduler, scheduler.optimal_timesteps(K)) <= enough
    assert expected_rate(scheduler, scheduler.optimal_timesteps(K - 1)) > enough
    assert f"| 10 | {expected_rate(scheduler, [round(111 * k) for k in range(9, -1, -1)], 'fixed_small'):.3f} |" in (
        steps_table(scheduler)
    )


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def digits_model(make_unet, tmp_path):
    """A saved model of 16×16 digits, as a stock repository: T = 6 to be quick."""
    folder = tmp_path / "model"
    scheduler = DDPMScheduler(6, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1, sample_size=16), scheduler).save_pretrained(folder)
    return folder


CALIBRATE = ["--dataset", "digits", "--num_images", "16"]


def test_calibrate_command_makes_sample_command_take_optimal(digits_model, tmp_path, capsys):
    from ddpm_hf.cli import main

    weights = (digits_model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    with pytest.raises(SystemExit, match="error: .*ddpm-hf calibrate"):
        main(["sample", str(digits_model), "--steps", "3", "--spacing", "optimal", "--output_dir", str(tmp_path / "a")])
    main(["calibrate", str(digits_model), *CALIBRATE])
    assert "| 6 |" in capsys.readouterr().out
    assert (digits_model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights
    assert (digits_model / "ddpm_few_steps.py").is_file()
    options = ["--num_images", "2", "--output_dir", str(tmp_path / "b"), "--variance_type", "optimal"]
    main(["sample", str(digits_model), "--steps", "3", "--spacing", "optimal", *options])
    assert (tmp_path / "b" / "00001.png").is_file()
    main(["calibrate", str(digits_model), *CALIBRATE, "--output_dir", str(tmp_path / "copy")])
    first, second = (DDPMPipelineCustom.from_pretrained(f).scheduler.config for f in (digits_model, tmp_path / "copy"))
    assert first["_calibration"] == second["_calibration"]


def test_a_class_conditional_model_is_calibrated_with_its_labels(make_unet, tmp_path, capsys):
    from ddpm_hf.cli import main

    scheduler = DDPMScheduler(6, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1, sample_size=16, num_class_embeds=11), scheduler).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="error: .*class_labels"):
        main(["calibrate", str(tmp_path), *CALIBRATE])
    main(["calibrate", str(tmp_path), *CALIBRATE, "--label_column", "label"])
    assert "| 6 |" in capsys.readouterr().out
    assert DDPMPipelineCustom.from_pretrained(tmp_path).scheduler.calibration.num_images == 16


def test_calibration_reports_what_is_done_to_images(make_unet, tmp_path, capsys):
    from ddpm_hf.cli import main

    scheduler = DDPMScheduler(6, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1, sample_size=8), scheduler).save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for i in range(16):
        Image.new("RGB", (8, 8), (9 * i, 200, 3)).save(tmp_path / "photos" / f"{i}.png")
    options = ["--train_data_dir", str(tmp_path / "photos"), "--cache_dir", str(tmp_path), "--num_images", "16"]
    main(["calibrate", str(tmp_path / "model"), *options])
    assert "photos are of mode RGB, and converted to the model's L." in capsys.readouterr().out


def test_classes_are_matched_by_name_where_a_folder_lacks_some(make_unet, tmp_path):
    """By position, its dogs would have been taken for the model's cats."""
    from ddpm_hf.evaluation.real_images import labels_of_network

    unet = make_unet(num_class_embeds=4)
    assert labels_of_network(torch.tensor([0, 0]), ["dogs"], unet).tolist() == [0, 0]  # no names: by position
    unet.register_to_config(_label_names=["cats", "dogs", "fish"])
    assert labels_of_network(torch.tensor([0, 1, 0]), ["dogs", "cats"], unet).tolist() == [1, 0, 1]
    assert labels_of_network(torch.tensor([0, 1]), ["1", "2"], unet).tolist() == [1, 2]  # an integer column
    assert labels_of_network(None, None, unet) is None
    with pytest.raises(ValueError, match="'birds', but the names of the labels are 'cats'"):
        labels_of_network(torch.tensor([0]), ["birds"], unet)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (gaussian_images(0.1, 15), {}, r"num_images` is 15.*at least 16"),
        (gaussian_images(0.1, 20), {"num_images": 21}, r"num_images` is 21.*only 20"),
        (gaussian_images(0.1, 20, size=16), {}, r"\(1, 16, 16\).*\(1, 8, 8\)"),
        (gaussian_images(0.1, 20, channels=3), {}, r"\(3, 8, 8\)"),
        (gaussian_images(0.1, 20)[0], {}, r"uint8 of \(1, 8, 8\).*\(N, C, H, W\)"),
        (gaussian_images(0.1, 20).float(), {}, "float32"),
        ([1, 2], {}, "list"),
        (gaussian_images(0.1, 20), {"batch_size": 0}, "batch_size"),
        (gaussian_images(0.1, 20), {"seed": -1}, "seed"),
        (gaussian_images(0.1, 20), {"class_labels": 1}, "unconditional"),
    ],
)
def test_bad_input_is_refused_before_the_network_runs(images, options, message, monkeypatch):
    pipe = oracle_pipeline(0.1)
    monkeypatch.setattr(OracleUNet, "forward", lambda *_, **__: pytest.fail("the network ran"))
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, images, show_progress=False, **options)
    assert "_calibration" not in pipe.scheduler.config


def test_other_schedulers_are_refused():
    pipe = oracle_pipeline(0.1)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler.*from_config"):
        calibrate(pipe, gaussian_images(0.1, 20))
    with pytest.raises(ValueError, match="DDIMScheduler"):
        pipe(num_inference_steps=4, timesteps="optimal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--dataset_name NAME"),
        (["--dataset", "digits", "--num_images", "15"], "num_images.*15.*at least 16"),
        (["--dataset", "digits", "--num_images", "3000"], "num_images.*3000.*1797"),
        ([*CALIBRATE, "--output_dir", "{model}/../other"], "output_dir.*holds another model"),
        (["--train_data_dir", "/nowhere"], "train_data_dir.*no such folder"),
    ],
)
def test_bad_calibrate_options_end_in_one_line_and_change_nothing(options, message, digits_model):
    from ddpm_hf.cli import main

    shutil.copytree(digits_model, digits_model.parent / "other")
    before = (digits_model / "scheduler" / "scheduler_config.json").read_bytes()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["calibrate", str(digits_model), *(option.format(model=digits_model) for option in options)])
    assert (digits_model / "scheduler" / "scheduler_config.json").read_bytes() == before
