"""A reader of the documentation: a folder with what the pages speak of, and a shell whose commands are made small."""

import json
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
from accelerate.commands.launch import launch_command_parser
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

from ddpm_hf.cli import main
from ddpm_hf.config.parsing import parse_train_command
from ddpm_hf.recipe.command import main as train_here
from support.models import tiny_unet
from support.runs import ROOT, TINY_UNET

SMALL_RUN = (
    "--unet", json.dumps(TINY_UNET), "--max_train_steps", "2", "--train_batch_size", "4", "--eval_batch_size", "4",
    "--ddpm_num_inference_steps", "2", "--save_images_steps", "0", "--calibration_images", "0", "--report_to", "none",
)  # fmt: skip
PLAN = ("--unet", json.dumps(TINY_UNET), "--report_to", "none", "--dry_run")  # of a run with a time budget
SMALL = {  # added to what the page says; later options win
    "train": SMALL_RUN,
    "sample": ("--num_images", "4", "--batch_size", "4"),
    "evaluate": ("--num_images", "32", "--num_likelihood_images", "4", "--likelihood_steps", "5"),
    "calibrate": ("--num_images", "16"),
    "restore": ("--steps", "2"),
    "edit": ("--steps", "4"),
    "compress": ("--steps", "50"),
    "interpolate": ("--num_inference_steps", "2"),
    "paper": ("--num_images", "4", "--num_likelihood_images", "2", "--batch_size", "4"),
    "doctor": ("--num_images", "8", "--num_samples", "4"),
    "feature_extractor": ("--updates", "2", "--num_images", "100"),
}


def furnish(folder: Path) -> None:
    """A trained model, images, photos with masks; a data set and a stock model with the names of those of the Hub."""
    output_dir = folder / "ddpm-digits"  # of a reader who has typed `ddpm-hf train`
    train_here([*SMALL_RUN, "--ddpm_num_steps", "100", "--output_dir", str(output_dir)])
    (output_dir / "checkpoint-2").rename(output_dir / "checkpoint-3400")

    pixels = np.random.default_rng(0).integers(256, size=(160, 32, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(p) for p in pixels]
    for i, picture in enumerate(pictures):
        place = folder / "my-images" / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
    hole = np.zeros((24, 20), np.uint8)
    hole[5:9] = 255
    Image.fromarray(hole).save(folder / "mask.png")
    (folder / "masks").mkdir()
    for i, name in enumerate(("photo.png", "photo2.png")):
        Image.fromarray(pixels[i, :24, :20, 0]).save(folder / name)
        Image.fromarray(hole).save(folder / "masks" / name)

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"img": pictures, "label": [0, 1] * 80}, features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "uoft-cs" / "cifar10")

    shutil.copytree(ROOT / "training" / "accelerate", folder / "training" / "accelerate")

    stock = DDPMPipeline(tiny_unet(sample_size=32), DDPMScheduler(100, beta_schedule="squaredcos_cap_v2"))
    stock.save_pretrained(folder / "google" / "ddpm-cifar10-32")


def write_yaml(content: str) -> None:
    """Write a file that the page shows, under the name in its first line."""
    name = content.splitlines()[0].removeprefix("# ")
    Path(name).write_text(content, "utf-8")


def run_shell(script: str) -> None:
    """Run the commands of a block in this process.

    Raises:
        SystemExit: with the message of a command that fails.
        ValueError: for a command that no page may have without saying that it is not run.
    """
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        command = [name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
        if command:
            run_command(command)


def run_command(command: list[str]) -> None:
    program, *arguments = command
    if program == "accelerate" and arguments[0] == "launch":
        launcher = launch_command_parser().parse_args(arguments[1:])
        if launcher.module:
            command = {"ddpm_hf": [], "ddpm_hf.training": ["train"]}[launcher.training_script]
            run_ddpm_hf([*command, *launcher.training_script_args])
        else:
            run_script(launcher.training_script, launcher.training_script_args)
    elif program == "ddpm-hf":
        run_ddpm_hf(arguments)
    elif program == "pip":
        return  # everything is installed
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


def run_ddpm_hf(given: list[str]) -> None:
    if "--time_budget" in given:
        train_here([*given[1:], *PLAN])
        if "--dry_run" not in given:
            shutil.copytree("ddpm-digits", f"ddpm-{given[1]}")  # what it would leave
        return
    arguments = [*given, *SMALL.get(given[0], ())]
    if given[0] in ("sample", "evaluate", "paper") and "--steps" not in given:
        arguments += ["--steps", "4"]
    if given[0] == "train" and "--global_batch_size" not in given:
        arguments += ["--global_batch_size", "4"]  # those of the paper need more images
    if given[0] == "demo" and shutil.which("npm") is None:  # which provides what the page computes with
        return
    if given == ["train"]:  # `furnish` has done it
        return
    if given[0] == "train":  # this process stands for all of them
        launch_options, options = parse_train_command(arguments[1:])
        if not launch_options.machine_rank:
            train_here(options)
    else:
        main(arguments)
