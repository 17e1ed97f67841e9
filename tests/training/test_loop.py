"""Whole runs on real scans: what they leave behind."""

import json
import math
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file

from ddpm_hf import DDPMPipelineCustom, cli
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import checkpoint_steps, load_checkpoint
from ddpm_hf.training.loop import train
from support.runs import ROOT, TINY_UNET, run, run_here, train_command, train_here


def test_a_run_leaves_a_pipeline_pictures_a_log_and_the_next_command(finished_run):
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


def test_a_run_its_checkpoint_and_stock_diffusers_make_the_same_images(finished_run):
    output_dir, _ = finished_run
    images = []
    for pipe in (
        DDPMPipelineCustom.from_pretrained(output_dir),
        DDPMPipelineCustom.from_pretrained(output_dir / "checkpoint-12"),
        DDPMPipeline.from_pretrained(output_dir),
    ):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(1, torch.Generator().manual_seed(0), 100, "np").images)
    np.testing.assert_array_equal(images[0], images[1])
    np.testing.assert_allclose(images[0], images[2], atol=2e-3)


def test_names_of_classes_go_from_folders_to_the_command_that_samples_them(tmp_path):
    for i, name in enumerate(("tabby cats", "dogs")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for j in range(6):
            Image.new("L", (16, 16), 100 * i + j).save(tmp_path / "pets" / name / f"{j}.png")
    data = ["--train_data_dir", str(tmp_path / "pets"), "--label_column", "label", "--resolution", "16"]
    run_dir, size = (
        tmp_path / "run",
        ["--channels", "1", "--cache_dir", str(tmp_path / "cache"), "--ddpm_num_steps", "9"],
    )
    assert train_here(run_dir, *data, *size, "--max_train_steps", "4").returncode == 0
    for folder in (run_dir, run_dir / "checkpoint-4"):
        config = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
        assert config["_label_names"] == ["dogs", "tabby cats"]
        assert "| Classes | 0 dogs, 1 tabby cats |" in (folder / "README.md").read_text("utf-8")
    more = ["--max_train_steps", "8", "--resume_from_checkpoint", "latest"]
    assert train_here(run_dir, *data, *size, *more).returncode == 0
    assert run_here(cli.main, ["convert", str(run_dir), str(tmp_path / "copy")]).returncode == 0
    made = {}
    for place, label in ((run_dir, "tabby cats"), (run_dir / "checkpoint-8", "1"), (tmp_path / "copy", "tabby cats")):
        out = tmp_path / f"samples-{place.name}"
        done = run_here(
            cli.main,
            ["sample", str(place), "--num_images", "2", "--class_label", label, "dogs", "--output_dir", str(out)],
        )
        assert done.returncode == 0, done.stderr
        made[place.name] = [(out / f"0000{i}.png").read_bytes() for i in range(2)]
        assert json.loads((out / "sampling.json").read_text("utf-8"))["class_labels"] == [1, 0]
    assert made["run"] == made["checkpoint-8"] == made["copy"]
    done = run_here(cli.main, ["sample", str(run_dir), "--class_label", "cats", "--output_dir", str(tmp_path / "none")])
    assert done.stderr.count("error") == 1
    assert "has 'cats', but the names of the labels are 'dogs' (0), 'tabby cats' (1)." in done.stderr
    assert not (tmp_path / "none").exists()


def test_only_the_newest_checkpoints_stay(finished_run):
    assert checkpoint_steps(finished_run[0]) == [8, 12]


def test_sample_command_writes_numbered_pngs_and_a_grid(finished_run, tmp_path):
    output_dir, _ = finished_run
    options = ["--num_images", "5", "--num_inference_steps", "4", "--seed", "3"]
    arrays = {}
    for batch_size, model in ((5, output_dir), (2, output_dir / "checkpoint-12")):
        out = tmp_path / f"out{batch_size}"
        sample = ["sample", str(model), *options, "--batch_size", str(batch_size), "--output_dir", str(out)]
        done = run_here(cli.main, sample)
        assert done.returncode == 0, done.stderr
        seen = sorted(p.name for p in out.glob("[!.]*"))
        assert seen == [*(f"{i:05d}.png" for i in range(5)), "grid.png", "sampling.json"]
        arrays[batch_size] = [np.asarray(Image.open(out / f"{i:05d}.png")).astype(int) for i in range(5)]
        assert arrays[batch_size][0].shape == (16, 16)
    for one, other in zip(arrays[5], arrays[2], strict=True):
        assert np.abs(one - other).max() <= 1  # the same image, whatever the batch it was made in


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
def test_the_command_keeps_few_checkpoints_and_the_drop_in_all_as_the_stock_script_does(tmp_path, monkeypatch):
    def drop_in(arguments):
        monkeypatch.setattr(sys, "argv", ["training/train.py", *arguments])
        runpy.run_path(str(ROOT / "training" / "train.py"), run_name="__main__")

    def ddpm_hf(arguments):
        cli.main(["train", *arguments])

    def train_by(command, updates, name):
        options = ["--unet", json.dumps(TINY_UNET), "--checkpointing_steps=1", "--ddpm_num_inference_steps=2"]
        options += ["--report_to=none", "--save_images_steps=0", "--eval_batch_size=2", "--calibration_images=0"]
        file = tmp_path / "options.yaml"
        file.write_text("dataset_name: digits\nresolution: 8\nchannels: 1\ncenter_crop: true\n")
        options += [f"--config={file}", f"--max_train_steps={updates}", "--resume_from_checkpoint=latest"]
        done = run_here(command, [*options, f"--output_dir={tmp_path / name}"])
        assert done.returncode == 0, done.stderr
        return checkpoint_steps(tmp_path / name)

    assert train_by(ddpm_hf, 3, "few") == [2, 3]
    assert train_by(drop_in, 3, "all") == [1, 2, 3]
    assert train_by(ddpm_hf, 4, "all") == [1, 2, 3, 4]  # what was kept so far is not deleted unasked
    assert train_by(drop_in, 4, "few") == [2, 3, 4]


@pytest.mark.slow
def test_a_command_line_of_the_stock_script_does_what_it_does_there(tmp_path):
    """A folder of images, the network from a file, epochs, tensorboard; the results are in the same places."""
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


@pytest.mark.slow
def test_a_run_that_has_diverged_keeps_its_last_good_checkpoint_and_can_be_resumed(finished_run, tmp_path):
    output_dir = tmp_path / "run"
    shutil.copytree(finished_run[0], output_dir)
    resume = ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "1", "--max_train_steps", "40"]
    done = train_here(output_dir, *resume, "--learning_rate", "1e30", "--max_skipped_steps", "5")
    assert done.returncode == 1
    assert "gradients in a row were not finite (--max_skipped_steps is 5), so the run ends at update 20" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads((output_dir / "logs" / "train.jsonl").read_text().splitlines()[-1])["skipped"] >= 5
    assert checkpoint_steps(output_dir) == [8, 12]
    again = train_here(output_dir, *resume)
    assert again.returncode == 0, again.stderr
    assert checkpoint_steps(output_dir) == [40]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_without_a_damaged_checkpoint(tmp_path):
    """The real thing: the kernel refuses to let a file grow. The optimizer's state is the largest one."""
    sizes = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000)); "
    script = (
        f"import sys; {sizes}import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run(train_command(tmp_path, launcher=(sys.executable, "-c", script)))
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: '{tmp_path}/checkpoint-4' can't be written (")
    assert re.search(r"free on its disk, and [0-9,]+ bytes are needed\. Earlier checkpoints are kept: free some", error)
    assert "--resume_from_checkpoint latest" in error
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.glob("checkpoint-*"))
    assert not any(tmp_path.glob("*.partial"))
    again = train_here(tmp_path, "--resume_from_checkpoint", "latest")  # with space again, it succeeds
    assert again.returncode == 0, again.stderr
    assert not any(tmp_path.glob("*.partial"))
