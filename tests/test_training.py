"""Training: Algorithm 1, and what a run promises to leave behind. Runs are real processes on real scans."""

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import kstest

from ddpm_hf import DDPMPipelineCustom, DDPMProcess
from ddpm_hf.checkpoint import checkpoint_steps, latest_checkpoint, load_checkpoint
from ddpm_hf.config import TrainConfig, parse_train_config
from ddpm_hf.data import Images, load_images, prepare_image, to_uint8, to_unit_range
from ddpm_hf.ddpm_process import make_betas
from ddpm_hf.objectives import l_simple, min_snr_weight, target
from ddpm_hf.run_folder import clear_output_dir
from ddpm_hf.training import (
    build_unet,
    ema_weights,
    learning_rate,
    local_batch,
    seed_step,
    train,
    training_loss,
)

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "training" / "configs" / "digits.yaml"
TINY_UNET = {
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "dropout": 0.1,
}
TINY = [
    "--unet", json.dumps(TINY_UNET), "--max_train_steps", "12", "--checkpointing_steps", "4", "--train_batch_size", "4",
    "--gradient_accumulation_steps", "2", "--lr_warmup_steps", "2", "--ddpm_num_inference_steps", "3",
    "--checkpoints_total_limit", "2", "--random_flip", "--eval_batch_size", "4", "--save_images_steps", "6",
]  # fmt: skip


def train_command(output_dir, *options, launcher=()):
    python = launcher or (sys.executable,)
    return [*python, str(ROOT / "training" / "train.py"), *TINY, "--output_dir", str(output_dir), *options]


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, cwd=options.pop("cwd", ROOT), **options, check=False)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The default job, made tiny: the same data, loop, EMA and pictures."""
    output_dir = tmp_path_factory.mktemp("run") / "digits"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    done = run(train_command(output_dir, launcher=launcher))
    assert done.returncode == 0, done.stderr
    return output_dir, done


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_run_leaves_pipeline_pictures_log_and_the_next_command(finished_run):
    output_dir, done = finished_run
    for name in ("samples.png", "real.png", "samples_and_real.png", "loss.png", "logs/samples-6.png"):
        assert min(Image.open(output_dir / name).size) > 90
    assert "ddpm-hf sample" in done.stdout
    assert "12/12" in done.stderr
    entries = [json.loads(line) for line in (output_dir / "logs" / "train.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [4, 8, 10, 12]
    assert all(math.isfinite(e["loss"]) and e["grad_norm"] > 0 for e in entries)
    assert {"loss", "lr", "step", "ema_decay"} <= set(entries[0])


def test_exported_weights_are_the_emas(finished_run):
    output_dir, _ = finished_run
    state = load_checkpoint(output_dir / "checkpoint-12")
    exported = load_file(output_dir / "unet" / "diffusion_pytorch_model.safetensors")
    assert state.ema is not None
    for name, weight in exported.items():
        assert torch.equal(weight, state.ema[name])
    assert any(not torch.equal(weight, state.weights[name]) for name, weight in exported.items())


def test_a_run_a_checkpoint_and_stock_diffusers_give_the_same_images(finished_run):
    output_dir, _ = finished_run
    images = []
    for pipe in (
        DDPMPipelineCustom.from_pretrained(output_dir),
        DDPMPipelineCustom.from_pretrained(output_dir / "checkpoint-12"),
        DDPMPipeline.from_pretrained(output_dir),
    ):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(1, torch.Generator().manual_seed(0), 1000, "np").images)
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_allclose(images[0], images[2], atol=2e-3)


def test_only_so_many_checkpoints_stay(finished_run):
    assert checkpoint_steps(finished_run[0]) == [8, 12]


def test_sample_command_writes_numbered_pngs_and_a_grid(finished_run, tmp_path):
    output_dir, _ = finished_run
    command = [sys.executable, "-c", "from ddpm_hf.cli import main; main()", "sample"]
    options = ["--num_images", "5", "--num_inference_steps", "4", "--seed", "3"]
    arrays = {}
    for batch_size, model in ((5, output_dir), (2, output_dir / "checkpoint-12")):
        out = tmp_path / f"out{batch_size}"
        done = run([*command, str(model), *options, "--batch_size", str(batch_size), "--output_dir", str(out)])
        assert done.returncode == 0, done.stderr
        assert sorted(p.name for p in out.iterdir()) == [*(f"{i:05d}.png" for i in range(5)), "grid.png"]
        arrays[batch_size] = [np.asarray(Image.open(out / f"{i:05d}.png")).astype(int) for i in range(5)]
        assert arrays[batch_size][0].shape == (16, 16)
    for one, other in zip(arrays[5], arrays[2], strict=True):
        assert np.abs(one - other).max() <= 1  # the same image, whatever the batch it was made in


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(finished_run, tmp_path):
    """Order, flips, timesteps, noise and dropout are functions of progress: nothing of the kill is left."""
    reference, _ = finished_run
    process = subprocess.Popen(train_command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not checkpoint_steps(tmp_path):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert max(checkpoint_steps(tmp_path)) < 12
    done = run(train_command(tmp_path, "--resume_from_checkpoint", "latest"))
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_checkpoint(folder / "checkpoint-12") for folder in (tmp_path, reference))
    assert ours.step == theirs.step
    for mine, other in ((ours.weights, theirs.weights), (ours.ema, theirs.ema)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    for mine, other in zip(ours.optimizer["state"].values(), theirs.optimizer["state"].values(), strict=True):
        assert all(torch.equal(mine[k], other[k]) for k in mine)
    for name in ("logs/train.jsonl", "samples.png"):
        assert (tmp_path / name).read_bytes() == (reference / name).read_bytes()


def test_a_run_is_not_overwritten_unless_asked(finished_run):
    output_dir, _ = finished_run
    before = {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}
    done = run(train_command(output_dir))
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert "--resume_from_checkpoint latest" in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_resuming_with_other_options_says_so_or_refuses(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    resume = ["--resume_from_checkpoint", "latest"]
    done = run(train_command(output_dir, *resume, "--prediction_type", "epsilon"))
    assert done.returncode == 1
    assert "`prediction_type` is 'epsilon', but was 'v_prediction'" in done.stderr
    done = run(train_command(output_dir, *resume, "--max_train_steps", "6"))
    assert "has 12 updates behind it, but the run has 6" in done.stderr
    # A damaged checkpoint is named, set aside and never counted as one to keep; a cut-off log line is no obstacle.
    weights = output_dir / "checkpoint-12" / "training_state" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    log = output_dir / "logs" / "train.jsonl"
    log.write_text(log.read_text()[:-5])
    flags = ["--max_train_steps", "9", "--checkpoints_total_limit", "1", "--adam_weight_decay", "0.5"]
    done = run(train_command(output_dir, *resume, *flags))
    assert done.returncode == 0, done.stderr
    assert "weights.safetensors is not what was written" in done.stdout
    assert "Changed: adam_weight_decay is 0.5, was 0.0001." in done.stdout
    assert checkpoint_steps(output_dir) == [9]
    assert (output_dir / "checkpoint-12.abandoned").is_dir()
    assert load_checkpoint(output_dir / "checkpoint-9").optimizer["param_groups"][0]["weight_decay"] == 0.5
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [4, 8, 9]


def test_clearing_removes_what_a_run_leaves_and_nothing_else(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    (output_dir / "notes.txt").write_text("mine")
    clear_output_dir(output_dir, 0, "logs")
    left = sorted(p.relative_to(output_dir).as_posix() for p in output_dir.rglob("*") if p.is_file())
    assert left == ["logs/config.json", "notes.txt"]


def test_damaged_checkpoints_are_skipped_and_named(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-12" / "training_state" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    folder, skipped = latest_checkpoint(tmp_path / "run")
    assert folder is not None
    assert folder.name == "checkpoint-8"
    assert "weights.safetensors is not what was written" in skipped[0]
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_checkpoint(tmp_path / "run" / "checkpoint-12")
    (tmp_path / "run" / "checkpoint-8" / "unet" / "config.json").unlink()
    assert latest_checkpoint(tmp_path / "run")[0] is None


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


def test_targets_are_what_the_predictions_mean():
    process = DDPMProcess(make_betas())
    x_0, noise, t = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([3, 700])
    x_t = process.q_sample(x_0, t, noise)
    for prediction_type in ("epsilon", "sample", "v_prediction"):
        goal = target(process, x_0, noise, t, prediction_type)
        torch.testing.assert_close(process.predict_x0(goal, x_t, t, prediction_type), x_0, rtol=1e-3, atol=1e-3)


def test_simple_loss_is_the_mean_square_per_image():
    a, b = torch.randn(2, 3, 2, 4, 4)
    expected = torch.stack([torch.nn.functional.mse_loss(a[i], b[i]) for i in range(3)])
    torch.testing.assert_close(l_simple(a, b), expected)
    weight = torch.tensor([1.0, 2.0, 0.0])
    torch.testing.assert_close(l_simple(a, b, weight), weight * expected)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_the_same_error_for_every_prediction(gamma):
    """Whatever is predicted, the weighted loss is min(SNR, γ) ‖x_0 - x̂_0‖² (arXiv 2303.09556)."""
    process = DDPMProcess(make_betas())
    t = torch.tensor([1, 300, 900])
    x_0, noise, error = torch.randn(3, 3, 1, 4, 4).double()
    x_t = process.q_sample(x_0, t, noise)
    wrong_x_0 = x_0 + 0.1 * error
    snr = process.snr(t)
    expected = torch.minimum(snr, torch.tensor(gamma)) * (0.1 * error).square().flatten(1).mean(1)
    for kind in ("sample", "epsilon", "v_prediction"):
        prediction = process.convert_prediction(wrong_x_0, x_t, t, "sample", kind)
        loss = (prediction - target(process, x_0, noise, t, kind)).square().flatten(1).mean(1)
        torch.testing.assert_close(min_snr_weight(process, t, kind, gamma).double() * loss, expected, rtol=1e-5, atol=0)


def test_learning_rate_counts_updates():
    config = TrainConfig(dataset_name="digits", learning_rate=1.0, lr_warmup_steps=10, lr_scheduler="cosine")
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[60] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_ema_weights_are_swapped_back_whatever_happens(make_unet):
    from diffusers.training_utils import EMAModel

    unet = make_unet()
    ema = EMAModel(unet.parameters(), decay=0.5)
    before = [p.clone() for p in unet.parameters()]
    for shadow in ema.shadow_params:
        shadow.zero_()

    def interrupted():
        with ema_weights(ema, unet):
            assert all((p == 0).all() for p in unet.parameters())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))


def test_randomness_is_a_function_of_progress():
    draws = {}
    for place in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        seed_step(*place)
        draws[place] = torch.randn(4)
        seed_step(*place)
        assert torch.equal(draws[place], torch.randn(4))
    values = list(draws.values())
    assert all(not torch.equal(values[i], values[j]) for i in range(5) for j in range(i))


class Stub(torch.nn.Module):
    """Predicts 0 and remembers what it saw."""

    def forward(self, x, t):
        self.x, self.t = x, t
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_training_draws_gaussian_noise_at_uniform_times():
    process, net = DDPMProcess(make_betas()), Stub()
    config = TrainConfig(dataset_name="digits")
    seed_step(0, 0, 0, 0)
    loss = training_loss(net, process, torch.zeros(4000, 1, 4, 4), config)
    assert (net.t.min(), net.t.max()) == (0, 999)
    assert kstest(net.t.numpy() / 1000, "uniform").pvalue > 1e-3
    eps = net.x / process.one_minus_alpha_bar(net.t).sqrt().float().reshape(-1, 1, 1, 1)
    assert kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(loss, eps.square().mean(), rtol=1e-4, atol=0)


def test_weighting_is_applied_to_the_loss():
    process, net, x_0 = DDPMProcess(make_betas()), Stub(), torch.zeros(64, 1, 4, 4)
    weighted = TrainConfig(dataset_name="digits", snr_gamma=5.0)
    seed_step(0, 0, 0, 0)
    loss = training_loss(net, process, x_0, weighted)
    eps = net.x / process.one_minus_alpha_bar(net.t).sqrt().float().reshape(-1, 1, 1, 1)
    weight = process.snr(net.t).clamp(max=5) / process.snr(net.t)
    torch.testing.assert_close(loss.double(), (weight * eps.square().flatten(1).mean(1)).mean(), rtol=1e-4, atol=0)


def test_processes_share_the_stream_without_overlap():
    images = Images(torch.arange(48, dtype=torch.uint8).reshape(48, 1, 1, 1), "numbers")
    config = TrainConfig(dataset_name="digits", train_batch_size=3, gradient_accumulation_steps=2)
    seen = []
    for step, micro_step, rank in itertools.product(range(4), range(2), range(2)):
        accelerator = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        seen += to_uint8(local_batch(images, config, accelerator, step, micro_step)).flatten().tolist()
    assert sorted(seen) == list(range(48))  # one epoch: each image once
    alone = SimpleNamespace(num_processes=1, process_index=0, device=torch.device("cpu"))
    one_process = TrainConfig(dataset_name="digits", train_batch_size=12, gradient_accumulation_steps=1)
    assert set(seen[:12]) == set(to_uint8(local_batch(images, one_process, alone, 0, 0)).flatten().tolist())


@pytest.mark.slow
def test_updates_are_algorithm_1_then_clipping_then_adamw_then_ema(tmp_path):
    """Two updates of two micro-steps, written out by hand."""
    options = {
        "dataset_name": "digits", "resolution": 8, "channels": 1, "center_crop": True,
        "unet": {**TINY_UNET, "dropout": 0.0}, "prediction_type": "v_prediction", "train_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_train_steps": 2, "learning_rate": 1e-2, "lr_warmup_steps": 4,
        "max_grad_norm": 0.01, "use_ema": True, "ema_max_decay": 0.6, "ddpm_num_inference_steps": 2,
        "eval_batch_size": 1, "save_images_steps": 1, "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    config = TrainConfig(**options)
    train(config)
    state = load_checkpoint(tmp_path / "run" / "checkpoint-2")

    process, images = DDPMProcess(make_betas()), load_images(config, show_progress=False)
    torch.manual_seed(config.seed)
    unet = build_unet(config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = [p.detach().clone() for p in unet.parameters()]
    for step in range(2):
        for micro_step in range(2):
            seed_step(0, step, micro_step, 0)
            x_0 = images.batch((2 * step + micro_step) * 4, 4, seed=0)
            t = torch.randint(1000, (4,))
            noise = torch.randn_like(x_0)
            a = process.alphas_cumprod[t].float().reshape(-1, 1, 1, 1)
            v = a.sqrt() * noise - (1 - a).sqrt() * x_0
            prediction = unet(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t).sample
            (torch.nn.functional.mse_loss(prediction, v) / 2).backward()
        norm = torch.cat([p.grad.flatten() for p in unet.parameters()]).norm()
        assert norm > 0.01  # so that clipping matters
        for p in unet.parameters():
            p.grad *= 0.01 / norm
        optimizer.param_groups[0]["lr"] = 1e-2 * (step + 1) / 4
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.6, 1 - (1 + step) ** -0.75)  # diffusers' warm-up: 0 at the first update
        for mean, p in zip(average, unet.parameters(), strict=True):
            mean.lerp_(p.detach(), 1 - decay)
    # Adam and clipping forgive a wrong scale of the loss; the logged norm does not.
    log = json.loads((tmp_path / "run" / "logs" / "train.jsonl").read_text().splitlines()[-1])
    assert log["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    for (name, p), mean in zip(unet.named_parameters(), average, strict=True):
        torch.testing.assert_close(state.weights[name], p.detach(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(state.ema[name], mean, rtol=1e-3, atol=1e-5)


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_stream_shows_each_image_once_per_epoch_in_new_orders():
    images = Images(torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1), "numbers")

    def stream(first, size):
        return to_uint8(images.batch(first, size, seed=0)).flatten().tolist()

    epochs = [stream(10 * e, 10) for e in range(3)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    endless = [*epochs[0], *epochs[1], *epochs[2]]
    assert stream(0, 30) == endless
    assert stream(7, 8) == endless[7:15]
    assert images.batch(0, 10, seed=1).flatten().tolist() != images.batch(0, 10, seed=0).flatten().tolist()


def test_pixels_map_to_plus_minus_one_and_back():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = to_unit_range(pixels)
    assert x[0] == -1
    assert x[255] == 1
    assert torch.equal(to_uint8(x), pixels)


def test_the_digits_are_scikit_learns():
    config = parse_train_config([], DIGITS)
    images = load_images(config, show_progress=False)
    assert images.pixels.shape == (1797, 1, 16, 16)
    from sklearn.datasets import load_digits

    pooled = torch.nn.functional.avg_pool2d(images.pixels[:, 0].double(), 2)
    correlation = np.corrcoef(pooled.flatten(), load_digits().images.ravel())[0, 1]
    assert correlation > 0.98  # 8×8 scans, only enlarged


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4), ("P", 3), ("CMYK", 3), ("LA", 1)])
def test_every_mode_becomes_what_the_network_takes(mode, channels):
    array = prepare_image(Image.new("RGB", (20, 10), (200, 100, 50)).convert(mode), 8, channels, None)
    assert array.shape == (channels, 8, 8)
    assert array.dtype == np.uint8
    if channels == 3 and mode != "L":
        assert np.abs(array[:, 4, 4].astype(int) - [200, 100, 50]).max() < 30


def test_flips_are_mirror_images_of_half_the_batch():
    pixels = torch.arange(64 * 4, dtype=torch.uint8).reshape(64, 1, 2, 2)
    images = Images(pixels, "numbers")
    torch.manual_seed(0)
    plain, flipped = images.batch(0, 64, seed=0), images.batch(0, 64, seed=0, flip=True)
    is_flipped = (flipped == plain.flip(-1)).flatten(1).all(1)
    is_plain = (flipped == plain).flatten(1).all(1)
    assert (is_flipped ^ is_plain).all()
    assert 16 < int(is_flipped.sum()) < 48


def test_crops_are_central_or_anywhere():
    gradient = Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (10, 1)))
    assert prepare_image(gradient, 10, 1, None)[0, 0, 0] == 15
    rng = np.random.default_rng(0)
    starts = {int(prepare_image(gradient, 10, 1, rng)[0, 0, 0]) for _ in range(300)}
    assert starts == set(range(31))


def test_sixteen_bit_images_are_scaled_not_cut_off():
    image = Image.fromarray(np.full((8, 8), 32768, np.uint16))
    assert (prepare_image(image, 8, 1, None) == 128).all()
    image = Image.fromarray(np.full((8, 8), 32768, np.int32))
    assert (prepare_image(image, 8, 1, None) == 128).all()
    with pytest.raises(ValueError, match="floating-point"):
        prepare_image(Image.fromarray(np.zeros((8, 8), np.float32)), 8, 1, None)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("L", (16, 8))
    image.paste(255, (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90° to see it upright
    image.save(tmp_path / "i.jpg", exif=exif, quality=95)
    upright = prepare_image(Image.open(tmp_path / "i.jpg"), 8, 1, None)[0]
    assert upright[0].mean() > 200  # the white half is on top


@pytest.mark.slow
def test_a_folder_of_images_trains(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "some"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.fromarray(rng.integers(0, 255, (12 + i, 20, 3), np.uint8)).save(folder / f"{i}.png")
    options = ["--train_data_dir", str(folder.parent), "--resolution", "8", "--channels", "3", "--max_train_steps", "2"]
    command = train_command(tmp_path / "out", *options, "--cache_dir", str(tmp_path / "cache"))
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "5 images" in done.stdout
    assert Image.open(tmp_path / "out" / "samples.png").mode == "RGB"


# --- configuration ---------------------------------------------------------------------------------------------------


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("dataset_name: digits\nlearning_rate: 3e-3\ntrain_batch_size: 7\n")
    config = parse_train_config(["--config", str(file), "--train_batch_size", "9"], DIGITS)
    assert (config.learning_rate, config.train_batch_size, config.resolution) == (3e-3, 9, 64)


def test_no_source_means_the_digits_and_a_source_means_stock_defaults():
    assert parse_train_config(["--seed", "5"], DIGITS).dataset_name == "digits"
    config = parse_train_config(["--train_data_dir", "pics"], DIGITS)
    assert (config.dataset_name, config.resolution, config.learning_rate) == (None, 64, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_batch_size", "0"], "train_batch_size.*0"),
        (["--ema_max_decay", "1.0"], "ema_max_decay.*1.0"),
        (["--ddpm_num_inference_steps", "2000"], "ddpm_num_inference_steps.*2000.*1000"),
        (["--dataset_name", "digits", "--train_data_dir", "x"], "both"),
        (["--unet", "{"], "unet.*JSON"),
        (["--channels", "2"], "channels.*2"),
        (["--learning_rate", "0"], "learning_rate.*0"),
        (["--learning_rate", "inf"], "learning_rate.*inf"),
        (["--ema_inv_gamma", "0"], "ema_inv_gamma.*0"),
        (["--logging_dir", "../x"], "logging_dir.*inside"),
        (["--logging_dir", "."], "logging_dir.*inside"),
        (["--output_dir", ""], "output_dir.*empty"),
        (["--config", "/nowhere.yaml"], "nowhere.yaml"),
        (["--model_config_name_or_path", "x"], "both --unet"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse_train_config(options, DIGITS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "learning_rat"),
        ("[1]", "option: value"),
        ("a: [", "not valid YAML"),
        ("dataset_name: digits\nresolution: [16]", "resolution.*of type int"),
        ("dataset_name: digits\nuse_ema: 3", "use_ema.*of type bool"),
        ("dataset_name: 7", "dataset_name.*of type str"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_train_config(["--config", str(tmp_path / "c.yaml")], DIGITS)
    (tmp_path / "c.yaml").write_text("dataset_name: digits\nlr_scheduler: sine\n")
    with pytest.raises(ValueError, match="lr_scheduler.*'sine'.*'cosine'"):
        parse_train_config(["--config", str(tmp_path / "c.yaml")], DIGITS)


def test_damaged_images_are_named(tmp_path):
    for name in ("1.png", "test_2.png"):  # `datasets` would take the second one for a test set
        Image.effect_noise((32, 32), 50).save(tmp_path / name)
    config = TrainConfig(train_data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), resolution=8)
    assert len(load_images(config, show_progress=False)) == 2
    (tmp_path / "3.png").write_bytes((tmp_path / "1.png").read_bytes()[:400])
    with pytest.raises(ValueError, match=r"image \d .* can't be read"):
        load_images(config, show_progress=False)


def test_parquet_files_are_datasets(tmp_path):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {"picture": [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(3)], "label": [0] * 3}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    config = TrainConfig(dataset_name=str(tmp_path / "t.parquet"), cache_dir=str(tmp_path / "cache"), resolution=8)
    assert load_images(config, show_progress=False).pixels[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_sources_that_hold_no_images_are_refused(tmp_path):
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, "no images")):
        config = TrainConfig(train_data_dir=str(path), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match=message):
            load_images(config, show_progress=False)


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"layer_per_block": 1}, "layer_per_block"),
        ({"num_class_embeds": 3}, "num_class_embeds"),
        ({"block_out_channels": 16}, "no UNet2DModel"),
    ],
)
def test_networks_that_can_not_be_built_are_refused(unet, message):
    with pytest.raises(ValueError, match=message):
        build_unet(TrainConfig(dataset_name="digits", resolution=16, unet={**TINY_UNET, **unet}))


def test_a_resolution_that_can_not_be_halved_is_refused():
    with pytest.raises(ValueError, match="resolution.*20.*multiple of 32"):
        build_unet(TrainConfig(dataset_name="digits", resolution=20))


def test_output_folders_that_can_not_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(train_command(tmp_path / "file" / "out"))
    assert done.returncode == 1
    assert "output_dir" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["/nowhere/at/all", "nobody/nothing", "bad//name"])
def test_unknown_models_are_named(model, tmp_path):
    from ddpm_hf.sampling import load_pipeline

    with pytest.raises(ValueError, match=f"no model '{model}'"):
        load_pipeline(model)
    with pytest.raises(ValueError, match="holds no model"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("damage", ["truncated weights", "missing weights", "no unet", "broken JSON", "no list", "key"])
def test_damaged_models_are_named(damage, make_unet, tmp_path):
    from safetensors.torch import save_file

    from ddpm_hf import DDPMSchedulerCustom
    from ddpm_hf.sampling import load_pipeline

    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "no unet":
        shutil.rmtree(tmp_path / "unet")
    elif damage == "broken JSON":
        (tmp_path / "unet" / "config.json").write_text("{")
    elif damage == "no list":
        (tmp_path / "model_index.json").write_text("[]")
    else:
        save_file({k: v for k, v in load_file(weights).items() if k != "conv_in.weight"}, weights)
    with pytest.raises(ValueError, match="is damaged"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_inference_steps", "2000"], "num_inference_steps.*2000"),
        (["--device", "abacus"], "device.*abacus"),
        (["--eta", "2"], "eta.*2"),
        (["--seed", str(2**64)], "seed.*2\\^63"),
        (["--class_label", "1"], "unconditional"),
        (["--revision", "v1"], "revision.*folder"),
    ],
)
def test_bad_sample_options_end_in_one_line_and_write_nothing(options, message, make_unet, tmp_path):
    from ddpm_hf import DDPMSchedulerCustom
    from ddpm_hf.cli import main

    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["sample", str(tmp_path / "model"), "--output_dir", str(out), *options])
    assert not out.exists() or not any(out.iterdir())


def test_images_of_a_longer_run_are_not_mixed_in(make_unet, tmp_path):
    from ddpm_hf import DDPMSchedulerCustom
    from ddpm_hf.cli import main

    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out")]
    main([*command, "--num_images", "3"])
    main([*command, "--num_images", "3"])  # the same again is fine
    with pytest.raises(SystemExit, match=r"holds 1 images of a longer run \(00002.png"):
        main([*command, "--num_images", "2"])


def test_checkpoints_of_the_stock_script_load(make_unet, tmp_path):
    from diffusers import DDPMScheduler

    from ddpm_hf.sampling import load_pipeline

    make_unet().save_pretrained(tmp_path / "checkpoint-500" / "unet_ema")
    with pytest.raises(ValueError, match="does not store its scheduler"):
        load_pipeline(str(tmp_path / "checkpoint-500"))
    DDPMScheduler(beta_schedule="sigmoid").save_pretrained(tmp_path / "scheduler")
    assert load_pipeline(str(tmp_path / "checkpoint-500")).scheduler.config.beta_schedule == "sigmoid"
