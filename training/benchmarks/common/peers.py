"""Other projects' training for `recipes.py`: the same images, the same time, each sampled as its authors do.

Each returns samples, uint8 (N, C, H, W), and what its training took. What a project leaves to its user, the size of the
network above all, is brought to that of our recipe; `-tuned` also has our learning rate and batch, where it has options
for them.
"""

import json
import math
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from torch import Tensor

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.storage.checkpoint import latest_checkpoint, read_progress

from .measuring import read_pixels, sample

BATCH = 64  # of sampling
STEPS = 50  # denoising-diffusion-pytorch's README has 250, diffusers' script 1000: too long on a CPU
Facts = dict[str, float]
TUNED = [  # of diffusers' script, which has no v-prediction
    "--ddpm_beta_schedule", "squaredcos_cap_v2", "--train_batch_size", "32", "--learning_rate", "2e-3",
    "--lr_warmup_steps", "100", "--adam_beta1", "0.9", "--adam_beta2", "0.99", "--ema_max_decay", "0.995",
]  # fmt: skip


def cpu_seconds_of_children() -> float:
    """CPU time of the processes that this one has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def copy_files(files: list[Path], folder: Path) -> Path:
    """Copy images into a folder that had others, or none."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "class00").mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder / "class00")
    return folder


def from_unit_range(x: Tensor) -> Tensor:
    """[0, 1] → uint8."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def in_batches(make: Callable[[int], Tensor], number: int) -> Tensor:
    """`number` samples in [0, 1] from a function that makes a batch of n."""
    with torch.no_grad():
        return torch.cat([from_unit_range(make(min(BATCH, number - i))) for i in range(0, number, BATCH)])


def denoising_diffusion_pytorch(
    images: Path, resolution: int, channels: int, seconds: float, clock: Callable[[], float], number: int, work: Path,
    tuned: bool,
) -> tuple[Tensor, Facts]:  # fmt: skip
    """Of lucidrains, its Trainer: v-prediction, sigmoid schedule and DDIM as its defaults and README have them."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    network = Unet(dim=16, dim_mults=(1, 2, 4), channels=channels)
    diffusion = GaussianDiffusion(network, image_size=resolution, sampling_timesteps=STEPS)
    options: dict[str, Any] = {"train_batch_size": 32, "train_lr": 2e-3} if tuned else {}
    trainer = Trainer(
        diffusion, str(images), results_folder=str(work / "lucidrains"), calculate_fid=False, train_num_steps=0,
        save_and_sample_every=10**9, augment_horizontal_flip=channels == 3, **options,
    )  # fmt: skip
    began = clock()
    while clock() - began < seconds:
        trainer.train_num_steps += 10
        trainer.train()
    facts = {"seconds": clock() - began, "updates": trainer.step, "images_seen": trainer.step * trainer.batch_size}
    return in_batches(lambda n: trainer.ema.ema_model.sample(batch_size=n), number), facts


def smalldiffusion(
    images: Path, resolution: int, channels: int, seconds: float, clock: Callable[[], float], number: int, work: Path,
    tuned: bool,
) -> tuple[Tensor, Facts]:  # fmt: skip
    """The loop of smalldiffusion, with the schedule, EMA and sampler of its example for Fashion-MNIST."""
    import smalldiffusion as sd
    from torch_ema import ExponentialMovingAverage

    pixels = list(read_pixels(images).float() / 127.5 - 1)
    batch = 32 if tuned else 1024
    loader = torch.utils.data.DataLoader(pixels, batch_size=batch, shuffle=True)  # type: ignore[arg-type]
    schedule = sd.ScheduleLogLinear(sigma_min=0.01, sigma_max=20, N=800)
    # Its group norms need multiples of 32 channels.
    network = sd.Scaled(sd.Unet)(
        resolution, channels, channels, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(resolution // 4,)
    )
    ema = ExponentialMovingAverage(network.parameters(), decay=0.999)
    began, updates = clock(), 0
    for updates, _ in enumerate(sd.training_loop(loader, network, schedule, lr=2e-3 if tuned else 7e-4)):  # noqa: B007
        ema.update()
        if clock() - began > seconds:
            break
    facts = {"seconds": clock() - began, "updates": updates, "images_seen": updates * batch}

    def make(n: int) -> Tensor:
        *_, x_0 = sd.samples(network, schedule.sample_sigmas(20), gam=1.6, batchsize=n)
        return (x_0 + 1) / 2

    with ema.average_parameters():
        return in_batches(make, number), facts


def train_unconditional(
    images: Path, resolution: int, channels: int, seconds: float, clock: Callable[[], float], number: int, work: Path,
    tuned: bool, script: Path, network: dict[str, Any],
) -> tuple[Tensor, Facts]:  # fmt: skip
    """The script of diffusers as a process of its own, on as many images as two short runs say fit into the time."""
    folder = work / "train_unconditional"
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "UNet2DModel", "sample_size": resolution, "in_channels": 3, "out_channels": 3, **network}
    (folder / "config.json").write_text(json.dumps(config))

    def run(source: Path, epochs: int) -> float:
        cpu_before, began = cpu_seconds_of_children(), time.monotonic()
        command = [
            sys.executable, str(script), "--train_data_dir", str(source), "--output_dir", str(folder / "model"),
            "--overwrite_output_dir", "--model_config_name_or_path", str(folder), "--resolution", str(resolution),
            "--center_crop", "--use_ema", "--num_epochs", str(epochs), "--save_images_epochs", "1000000",
            "--save_model_epochs", "1000000", "--checkpointing_steps", "1000000", "--eval_batch_size", "1",
            "--ddpm_num_inference_steps", "2", *(TUNED if tuned else []),
            *(["--random_flip"] if tuned and channels == 3 else []),
        ]  # fmt: skip
        subprocess.run(command, check=True)
        cpu = cpu_seconds_of_children() - cpu_before
        return cpu if clock is time.process_time else time.monotonic() - began

    files = sorted(images.rglob("*.png"), key=lambda file: file.name)
    few = copy_files(files[:320], folder / "few")
    one, three = run(few, 1), run(few, 3)
    per_image = (three - one) / (2 * min(320, len(files)))
    # It counts in whole epochs: of as many images as make them fit.
    images_seen = seconds / per_image
    epochs = math.ceil(images_seen / len(files))
    files = files[: math.ceil(images_seen / epochs)]
    took = run(copy_files(files, folder / "part"), epochs) - (one - 320 * per_image)
    pipeline = DDPMPipeline.from_pretrained(folder / "model")
    pipeline.set_progress_bar_config(disable=True)

    def make(n: int) -> Tensor:
        made = pipeline(n, num_inference_steps=STEPS, output_type="np").images
        x_0 = torch.from_numpy(made).permute(0, 3, 1, 2)
        return x_0 if channels == 3 else x_0.mean(1, keepdim=True)

    seen = epochs * len(files)
    return in_batches(make, number), {
        "seconds": took,
        "updates": epochs * math.ceil(len(files) / (32 if tuned else 16)),
        "images_seen": seen,
    }


def ddpm_hf_train(
    images: Path, resolution: int, channels: int, seconds: float, clock: Callable[[], float], number: int, work: Path,
    tuned: bool, steps: int,
) -> tuple[Tensor, Facts]:  # fmt: skip
    """Our command as a user types it, with all that it does in its time: of the wall clock in any case."""
    folder = work / "ddpm_hf_train"
    command = [
        sys.executable, "-m", "ddpm_hf", "train", str(images), "--time_budget", f"{seconds:g}s", "--output_dir",
        str(folder), "--overwrite_output_dir", "--cpu_threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    began, cpu_before = time.monotonic(), cpu_seconds_of_children()
    subprocess.run(command, check=True)
    took = cpu_seconds_of_children() - cpu_before if clock is time.process_time else time.monotonic() - began
    checkpoint, _ = latest_checkpoint(folder)
    progress = read_progress(checkpoint or folder)
    samples = sample(DDPMPipelineCustom.from_pretrained(folder), number, steps)
    return samples, {"seconds": took, "updates": progress["step"], "images_seen": progress["images_seen"]}


PEERS: dict[str, Callable[..., tuple[Tensor, Facts]]] = {
    "train_unconditional": train_unconditional,
    "denoising_diffusion_pytorch": denoising_diffusion_pytorch,
    "smalldiffusion": smalldiffusion,
    "ddpm_hf_train": ddpm_hf_train,
}
