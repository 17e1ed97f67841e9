"""A reader of the documentation: a folder with what the pages speak of, and a shell whose commands are made small."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import datasets
import numpy as np
from accelerate.commands.launch import launch_command_parser
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ddpm_hf import TrainConfig, train
from ddpm_hf.cli import main
from ddpm_hf.config.parsing import parse_train_config
from support.models import tiny_unet
from support.runs import ROOT, TINY_UNET

SMALL_RUN = (
    "--unet", json.dumps(TINY_UNET), "--max_train_steps", "2", "--train_batch_size", "4", "--eval_batch_size", "4",
    "--ddpm_num_inference_steps", "2", "--save_images_steps", "0", "--calibration_images", "0", "--report_to", "none",
)  # fmt: skip
SMALL = {  # added to what the page says; later options win
    "train": SMALL_RUN,
    "sample": ("--num_images", "4", "--batch_size", "4"),
    "evaluate": ("--num_images", "32", "--num_likelihood_images", "4", "--likelihood_steps", "5"),
    "calibrate": ("--num_images", "16"),
    "feature_extractor": ("--updates", "2", "--num_images", "100"),
}


def furnish(folder: Path) -> None:
    """A trained model with a checkpoint, a folder of images, a data set and a stock model of the Hub's names."""
    options = {
        "dataset_name": "digits", "resolution": 16, "channels": 1, "unet": TINY_UNET, "use_ema": True,
        "ddpm_num_steps": 100, "ddpm_beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction",
        "max_train_steps": 2, "train_batch_size": 4, "eval_batch_size": 4, "ddpm_num_inference_steps": 2,
        "report_to": ["none"], "calibration_images": 0,
    }  # fmt: skip
    train(TrainConfig(**options, output_dir=str(folder / "ddpm-digits")))
    (folder / "ddpm-digits" / "checkpoint-2").rename(folder / "ddpm-digits" / "checkpoint-3400")

    pixels = np.random.default_rng(0).integers(256, size=(64, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p) for p in pixels]
    for i, picture in enumerate(pictures):
        place = folder / "my-images" / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 32}, features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "uoft-cs" / "cifar10")

    stock = DDPMPipeline(tiny_unet(sample_size=32), DDPMScheduler(100, beta_schedule="squaredcos_cap_v2"))
    stock.save_pretrained(folder / "google" / "ddpm-cifar10-32")


def run_shell(script: str) -> None:
    """Run the commands of a block in this process.

    Raises:
        SystemExit: with the message of a command that fails.
        ValueError: for a command that no page may have without saying that it is not run.
    """
    for line in script.replace("\\\n", " ").splitlines():
        command = shlex.split(line, comments=True)
        if command:
            run_command(command)


def run_command(command: list[str]) -> None:
    program, *arguments = command
    if program == "accelerate" and arguments[0] == "launch":
        launcher = launch_command_parser().parse_args(arguments[1:])
        arguments = launcher.training_script_args
        if launcher.module:
            arguments = [] if launcher.training_script == "ddpm_hf" else [launcher.training_script.split(".")[-1]]
            arguments += launcher.training_script_args
            run_ddpm_hf(arguments)
        else:
            run_script(launcher.training_script, arguments)
    elif program == "ddpm-hf":
        run_ddpm_hf(arguments)
    elif program == "python":
        run_script(*arguments[:1], arguments[1:])
    else:
        raise ValueError(f"{shlex.join(command)} can't be run here: mark its block with <!--- skip: next -->.")


def run_script(script: str, arguments: list[str]) -> None:
    """A script of the repository; `training/train.py` and its neighbours are commands of `ddpm-hf`."""
    assert (ROOT / script).is_file(), f"there is no {script}"
    name = Path(script).stem
    if name in ("train", "sample", "evaluate"):
        run_ddpm_hf([name, *arguments])
        return
    before, sys.argv = sys.argv, [script, *arguments, *SMALL.get(name, ())]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = before


def run_ddpm_hf(arguments: list[str]) -> None:
    arguments = [*arguments, *SMALL.get(arguments[0], ())]
    if arguments[0] == "train":
        train(parse_train_config(arguments[1:]))
    else:
        main(arguments)
