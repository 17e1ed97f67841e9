"""Training: Algorithm 1, and what a run promises to leave behind. Runs are real processes on real scans."""

import itertools
import json
import math
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import kstest

from ddpm_hf import DDPMPipelineCustom, DDPMProcess
from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.data.dataset import load_images
from ddpm_hf.data.pixels import normalize
from ddpm_hf.diffusion.ddpm_process import make_betas
from ddpm_hf.diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ddpm_hf.distributed import Agreement
from ddpm_hf.storage.checkpoint import checkpoint_steps, latest_checkpoint, load_checkpoint
from ddpm_hf.training.loop import train
from ddpm_hf.training.losses import training_losses
from ddpm_hf.training.network import build_ema, build_unet, ema_weights
from ddpm_hf.training.output_folder import clear_output_dir, prepare_output_dir
from ddpm_hf.training.plan import Plan
from ddpm_hf.training.state import Run, compare, restore
from ddpm_hf.training.step import seed_part, skip_unless_finite
from support.runs import TINY_UNET, run, train_command


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
    for name in ("samples.png", "real.png", "samples_and_real.png", "loss.png", "logs/test_samples-6.png"):
        assert min(Image.open(output_dir / name).size) > 90
    assert "ddpm-hf sample" in done.stdout
    assert "12/12" in done.stderr
    entries = [json.loads(line) for line in (output_dir / "logs" / "train.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == [10, 12]
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
        seen = sorted(p.name for p in out.glob("[!.]*"))
        assert seen == [*(f"{i:05d}.png" for i in range(5)), "grid.png", "sampling.json"]
        arrays[batch_size] = [np.asarray(Image.open(out / f"{i:05d}.png")).astype(int) for i in range(5)]
        assert arrays[batch_size][0].shape == (16, 16)
    for one, other in zip(arrays[5], arrays[2], strict=True):
        assert np.abs(one - other).max() <= 1  # the same image, whatever the batch it was made in


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
    assert "weights.safetensors differs from its hash" in done.stdout
    assert "Changed: adam_weight_decay is 0.5, was 0.0001." in done.stdout
    assert checkpoint_steps(output_dir) == [9]
    assert (output_dir / "checkpoint-12.abandoned").is_dir()
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [9]


def test_a_resumed_optimizer_has_its_moments_and_the_options_of_now(finished_run):
    from accelerate import Accelerator

    checkpoint = finished_run[0] / "checkpoint-12"
    state = load_checkpoint(checkpoint)
    config = TrainConfig(**{**state.progress["config"], "adam_weight_decay": 0.5, "gradient_accumulation_steps": 1})
    accelerator = Accelerator(cpu=True)
    unet = build_unet(config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0, weight_decay=config.adam_weight_decay)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    plan, ema = Plan(config, 1797, 1, 12, 96), build_ema(config, unet)
    run = Run(config, plan, DDPMSchedulerCustom(), accelerator, Agreement(1), unet, optimizer, ema)
    assert compare(checkpoint, state.progress, config, plan, None) == [
        "Changed: gradient_accumulation_steps is 1, was 2.", "Changed: adam_weight_decay is 0.5, was 0.0001."
    ]  # fmt: skip
    with pytest.raises(ValueError, match="labels None, but the data has"):
        compare(checkpoint, state.progress, config, plan, ["cat", "dog"])
    restore(run, checkpoint)
    assert (run.step, run.images_seen) == (12, 12 * 8)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 1.0
    for (name, weight), shadow in zip(unet.named_parameters(), run.ema.shadow_params, strict=True):
        assert torch.equal(weight, state.weights[name])
        assert torch.equal(shadow, state.ema[name])
        for key, value in optimizer.optimizer.state[weight].items():
            assert torch.equal(value, state.optimizer[f"{name}/{key}"])


@pytest.mark.slow
def test_what_a_kill_left_undone_after_a_checkpoint_is_made_up_for(finished_run, tmp_path):
    """Killed between the last checkpoint and the export; and before that, a preview was due and not made."""
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    reference = (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name in ("unet", "scheduler"):
        shutil.rmtree(output_dir / name)
    (output_dir / "model_index.json").unlink()
    moved = tmp_path / "bigger disk"  # and its owner has moved a checkpoint away, which goes when its time comes
    (output_dir / "checkpoint-8").rename(moved)
    (output_dir / "checkpoint-8").symlink_to(moved)
    done = run(train_command(output_dir, "--resume_from_checkpoint", "latest"))
    assert done.returncode == 0, done.stderr
    assert (output_dir / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == reference
    longer = ["--resume_from_checkpoint", "latest", "--max_train_steps", "16"]
    done = run(train_command(output_dir, *longer))
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(output_dir) == [12, 16]


@pytest.mark.slow
def test_another_runs_folder_is_not_gone_on_in(finished_run, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(finished_run[0], theirs)
    before = {p: p.stat().st_mtime_ns for p in theirs.rglob("*") if p.is_file()}
    checkpoint = str(finished_run[0] / "checkpoint-8")
    done = run(train_command(theirs, "--resume_from_checkpoint", checkpoint))
    assert done.returncode == 1
    assert "holds another run" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in theirs.rglob("*") if p.is_file()}
    done = run(train_command(tmp_path / "new", "--resume_from_checkpoint", checkpoint))  # a fork into a new folder
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(tmp_path / "new") == [8, 12]  # so that `latest` is never a new beginning there
    ours, reference = (load_checkpoint(f / "checkpoint-12") for f in (tmp_path / "new", finished_run[0]))
    for name, weight in reference.weights.items():  # by another number of threads, perhaps
        torch.testing.assert_close(ours.weights[name], weight, rtol=1e-3, atol=1e-5)


def refused(tmp_path, *options):
    """The error of a run on a folder of images, which has not decoded or written anything."""
    images = tmp_path / "images"
    images.mkdir(exist_ok=True)
    for i in range(6):
        Image.effect_noise((16, 16), 60).save(images / f"{i}.png")
    config = parse_train_config(
        [
            f"--train_data_dir={images}", f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'out'}",
            "--channels=1", "--resolution=16", "--train_batch_size=2", *options,
        ],

    )  # fmt: skip
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller looks at it)
        train(config)
    assert not list(tmp_path.rglob("decoded_images"))
    assert not (tmp_path / "out").exists()
    return str(error.value)


def test_what_can_not_work_is_found_before_anything_is_decoded(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    unet = "--unet=" + json.dumps(TINY_UNET)
    assert "multiple of" in refused(tmp_path, unet, "--resolution=17")
    assert "only 6 images" in refused(tmp_path, unet, "--train_batch_size=7")
    assert "can't run" in refused(tmp_path, "--unet=" + json.dumps({**TINY_UNET, "layers_per_block": 0}))
    for wrong in ({"in_channels": 3}, {"out_channels": 7}):
        assert "1 channels" in refused(tmp_path, "--unet=" + json.dumps({**TINY_UNET, **wrong}))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "`mixed_precision` is 'fp16'" in refused(tmp_path, unet, "--mixed_precision=fp16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_output_folders_with_something_in_the_way_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unet").write_text("a file")
    config = TrainConfig(dataset_name="digits", output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="unet' is not a folder"):
        prepare_output_dir(tmp_path / "out", config)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link' is not a folder"):
        prepare_output_dir(tmp_path / "link", config)


def test_a_dry_run_says_what_a_run_would_and_trains_nothing(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    before = {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}
    options = ["--resume_from_checkpoint", "latest", "--dry_run"]
    done = run(train_command(output_dir, *options))
    assert done.returncode == 0, done.stderr
    assert "updates      12 of 8 images" in done.stdout
    assert "prediction_type: v_prediction" in done.stdout
    assert "validation   none (--eval_steps)" in done.stdout
    done = run(train_command(output_dir, *options, "--prediction_type", "sample"))
    assert done.returncode == 1
    assert "is of another model" in done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in output_dir.rglob("*") if p.is_file()}


def test_clearing_removes_what_a_run_leaves_and_nothing_else(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    (output_dir / "notes.txt").write_text("mine")
    config = TrainConfig(dataset_name="digits", output_dir=str(output_dir))
    files = sorted(output_dir.rglob("*"))
    clear_output_dir(config, 0)
    assert files == sorted(output_dir.rglob("*"))
    clear_output_dir(replace(config, overwrite_output_dir=True), 0)
    left = sorted(p.relative_to(output_dir).as_posix() for p in output_dir.rglob("*") if p.is_file())
    assert left == [".lock", "README.md", "logs/config.json", "notes.txt"]  # a card may hold a person's words


def test_damaged_checkpoints_are_skipped_and_named(finished_run, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-12" / "training_state" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    folder, skipped = latest_checkpoint(tmp_path / "run")
    assert folder is not None
    assert folder.name == "checkpoint-8"
    assert "weights.safetensors differs from its hash" in skipped[0]
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        load_checkpoint(tmp_path / "run" / "checkpoint-12")
    (tmp_path / "run" / "checkpoint-8" / "unet" / "config.json").unlink()
    assert latest_checkpoint(tmp_path / "run")[0] is None


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


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


TRAINABLE = {
    "hybrid, learned range, classes": {
        "objective": "hybrid", "variance_type": "learned_range", "label_column": "label", "prediction_type": "epsilon",
    },
    "the bound alone": {"objective": "vlb", "variance_type": "fixed_large"},
    "the bound with learned range": {"objective": "vlb", "variance_type": "learned_range"},
    "P2": {"loss_weighting": "p2", "prediction_type": "v_prediction"},
    "min-SNR": {"snr_gamma": 5.0, "prediction_type": "v_prediction", "mixed_precision": "bf16"},
    "SNR weights of x_0, without EMA": {"prediction_type": "sample", "use_ema": False},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINABLE)
def test_every_objective_trains(name, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one precision, this one has several
    options = {
        "dataset_name": "digits", "resolution": 8, "channels": 1, "center_crop": True, "train_batch_size": 16,
        "unet": {**TINY_UNET, "dropout": 0.0}, "max_train_steps": 60, "learning_rate": 3e-3, "lr_warmup_steps": 5,
        "use_ema": True, "ddpm_num_inference_steps": 3, "eval_batch_size": 4, "save_images_steps": 0,
        "report_to": ["none"], "output_dir": str(tmp_path),
    }  # fmt: skip
    train(TrainConfig(**{**options, **TRAINABLE[name]}))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "logs" / "train.jsonl").read_text().splitlines()]
    assert len(losses) == 6
    assert sum(losses[3:]) < 0.9 * sum(losses[:3])
    pipeline = DDPMPipelineCustom.from_pretrained(tmp_path)
    assert all(p.isfinite().all() for p in pipeline.unet.parameters())
    classes = {"class_labels": [3], "guidance_scale": 2.0} if "label_column" in TRAINABLE[name] else {}
    image = pipeline(1, torch.Generator().manual_seed(0), 3, "pt", **classes).images
    assert image.isfinite().all()
    assert pipeline.scheduler.config.variance_type == TRAINABLE[name].get("variance_type", "fixed_small")


@pytest.mark.slow
def test_a_command_line_of_the_stock_script_does_what_it_does_there(tmp_path):
    """A folder of images, the network from a file, epochs, tensorboard; the results where they are there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    images, network, output_dir = tmp_path / "images", tmp_path / "network", tmp_path / "ddpm-ema-noise-16"
    images.mkdir()
    network.mkdir()
    for i in range(20):
        Image.effect_noise((24, 20), 60).convert("RGB").save(images / f"{i}.png")
    stock = {"_class_name": "UNet2DModel", "sample_size": 16, "in_channels": 3, "out_channels": 3, **TINY_UNET}
    (network / "config.json").write_text(json.dumps(stock))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "training/train.py",
        f"--train_data_dir={images}", f"--model_config_name_or_path={network}", f"--output_dir={output_dir}",
        "--resolution=16", "--center_crop", "--random_flip", "--train_batch_size=4", "--num_epochs=3",
        "--gradient_accumulation_steps=1", "--use_ema", "--learning_rate=1e-4", "--lr_warmup_steps=5",
        "--mixed_precision=no", "--save_images_epochs=2", "--save_model_epochs=1", "--eval_batch_size=4",
        "--ddpm_num_steps=100", "--ddpm_num_inference_steps=3", "--checkpointing_steps=10", "--logger=tensorboard",
        "--checkpoints_total_limit=2", "--dataloader_num_workers=0", "--overwrite_output_dir",
        "--resume_from_checkpoint=latest", f"--cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert checkpoint_steps(output_dir) == [10, 15]
    assert DDPMPipeline.from_pretrained(output_dir).scheduler.config.num_train_timesteps == 100
    events = EventAccumulator(str(output_dir / "logs" / "train_ddpm"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "loss_quarter_1", "lr", "grad_norm", "ema_decay", "step", "images_per_second"} <= set(
        tags["scalars"]
    )
    assert {"test_samples", "test_samples_raw"} <= set(tags["images"])


def test_an_update_without_a_finite_gradient_changes_nothing():
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], lr=0.1, fused=True))

    def update(gradient):
        weight.grad = torch.full((3,), gradient)
        is_finite = skip_unless_finite(optimizer, weight.grad.norm(), accelerator)
        optimizer.step()
        return bool(is_finite)

    assert update(1.0)
    before = [weight.clone(), *(value.clone() for value in optimizer.state[weight].values())]
    for gradient in (math.nan, math.inf):
        assert not update(gradient)
        assert all(torch.equal(a, b) for a, b in zip(before, [weight, *optimizer.state[weight].values()], strict=True))
    assert update(1.0)
    assert not torch.equal(weight, before[0])


@pytest.mark.slow
def test_a_run_that_has_diverged_ends_with_its_last_good_checkpoint_and_can_go_on(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    resume = ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "1", "--max_train_steps", "40"]
    done = run(train_command(output_dir, *resume, "--learning_rate", "1e30", "--max_skipped_steps", "5"))
    assert done.returncode == 1
    assert "gradients in a row were not finite (--max_skipped_steps is 5), so the run ends at update 20" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((output_dir / "logs" / "train.jsonl").read_text().splitlines()[-1])["skipped"] >= 5
    assert checkpoint_steps(output_dir) == [8, 12]
    again = run(train_command(output_dir, *resume))
    assert again.returncode == 0, again.stderr
    assert checkpoint_steps(output_dir) == [40]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(tmp_path):
    """The real thing: the kernel refuses to let a file grow. The optimizer's state is the largest one."""
    sizes = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000)); "
    script = (
        f"import sys; {sizes}import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run(train_command(tmp_path, launcher=(sys.executable, "-c", script)))
    assert done.returncode == 1
    assert "checkpoint can't be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.glob("checkpoint-*[0-9]"))
    again = run(train_command(tmp_path, "--resume_from_checkpoint", "latest"))  # with space again, it goes through
    assert again.returncode == 0, again.stderr
    assert not any(tmp_path.glob("*.partial"))


def test_randomness_is_a_function_of_progress():
    draws = {}
    for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        seed_part(*place)
        draws[place] = torch.randn(4)
        seed_part(*place)
        assert torch.equal(draws[place], torch.randn(4))
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws.values(), 2))


class Stub(torch.nn.Module):
    """Predicts 0 and remembers what it saw."""

    def forward(self, x, t):
        self.x, self.t = x, t
        return SimpleNamespace(sample=torch.zeros_like(x))


def test_training_draws_gaussian_noise_at_uniform_times():
    process, net = DDPMProcess(make_betas()), Stub()
    seed_part(0, 0, 0)
    losses, t = training_losses(net, process, torch.zeros(4000, 1, 4, 4), None, TrainConfig(dataset_name="digits"))
    assert torch.equal(t, net.t)
    assert (t.min(), t.max()) == (0, 999)
    assert kstest(t.numpy() / 1000, "uniform").pvalue > 1e-3
    eps = net.x / process.one_minus_alpha_bar(t).sqrt().float().reshape(-1, 1, 1, 1)
    assert kstest(eps.flatten().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(losses, eps.square().flatten(1).mean(1), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_updates_are_algorithm_1_then_clipping_then_adamw_then_ema(tmp_path):
    """Three updates of two micro-steps, written out by hand."""
    options = {
        "dataset_name": "digits", "resolution": 8, "channels": 1, "center_crop": True,
        "unet": {**TINY_UNET, "dropout": 0.0}, "prediction_type": "v_prediction", "train_batch_size": 4,
        "gradient_accumulation_steps": 2, "max_train_steps": 3, "learning_rate": 1e-2, "lr_warmup_steps": 4,
        "max_grad_norm": 0.01, "use_ema": True, "ema_max_decay": 0.6, "ddpm_num_inference_steps": 2,
        "eval_batch_size": 1, "save_images_steps": 1, "report_to": ["none"], "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    config = TrainConfig(**options)
    mine = tmp_path / "run" / "scheduler" / "mine.txt"  # in a folder that no run has used, nothing is removed
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    train(config)
    assert mine.read_text() == "mine"
    state = load_checkpoint(tmp_path / "run" / "checkpoint-3")

    process, images = DDPMProcess(make_betas()), load_images(config, show_progress=False)
    torch.manual_seed(config.seed)
    unet = build_unet(config)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1.0, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    average = [p.detach().clone() for p in unet.parameters()]
    batches = images.batches(0, 4, 4, seed=0)
    for step in range(3):
        for micro_step in range(2):
            seed_part(0, step, micro_step)
            x_0 = normalize(next(batches).pixels)
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
        optimizer.param_groups[0]["lr"] = (
            1e-2 * step / 4
        )  # as in diffusers, the first update is the zeroth of the warm-up
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
