"""What the commands of `ddpm-hf` do. Imports that take seconds are made when they are needed."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from .config.commands import (
    CalibrateConfig,
    ConvertConfig,
    EnvConfig,
    EvaluateConfig,
    PushConfig,
    SampleConfig,
)
from .config.parsing import parse_train_command
from .training.__main__ import main as train_here

if TYPE_CHECKING:
    from accelerate import PartialState

    from .diffusion.pipeline import DDPMPipelineCustom


def train(argv: Sequence[str]) -> None:
    """Train in this process, or in the processes that Accelerate's launcher starts."""
    options, others = parse_train_command(argv)  # mistakes are found before torch is imported
    from .training.launch import is_launched, launch, needs_launcher

    if is_launched() and options.given():
        raise ValueError(
            f"{options.given()[0]} configures a launcher, but a launcher has started this process: leave it out."
        )
    if needs_launcher(options) and not is_launched():
        launch(options, others)
    else:
        train_here(others)


def sample(model: str, config: SampleConfig) -> Path:
    """Fill the output folder with images and `grid.png`, with all processes; returns the folder."""
    from .sampling.batch_size import fitting_batch_size
    from .sampling.files import image_files
    from .sampling.folder import sample_to_folder
    from .sampling.generate import check_options
    from .storage.files import check_writable

    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    state = _processes()
    pipeline, call_options = _load_pipeline(model, config, config.dtype), config.call_options()
    pipeline.scheduler = config.configure(pipeline.scheduler)
    check_options(pipeline, config.class_label, **call_options)  # before anything is compiled
    batch_size = config.batch_size or fitting_batch_size(pipeline.unet)
    if config.fast:
        missing = config.num_images - len(image_files(output_dir, config.format).existing())
        share = max(missing // state.num_processes, 1)
        rows = min(batch_size, config.num_images)
        described = pipeline.enable_fast_sampling(share, config.num_inference_steps, rows, config.guidance_scale)
        if state.is_main_process:
            print(f"Fast sampling: {described}.")
    with _out_of_memory_explained(batch_size):
        made = sample_to_folder(
            pipeline,
            output_dir,
            config.num_images,
            config.seed,
            batch_size,
            format=config.format,
            class_labels=config.class_label,
            **call_options,
        )
    if state.is_main_process:
        earlier = config.num_images - made
        print(f"{config.num_images} images are in {output_dir}/: {made} new, {earlier} from before.")
    return output_dir


def evaluate(model: str, config: EvaluateConfig) -> Path:
    """Measure a model, and write `metrics.json`, plots and its card; returns the path of `metrics.json`."""
    from .evaluation.evaluate import evaluate as measure
    from .evaluation.results import RESULTS_FILE, choose_output_dir
    from .sharing.card import CardFacts, is_average, write_card

    folder, ema = choose_output_dir(model, config.output_dir), is_average(Path(model))
    state = _processes()
    pipeline = _load_pipeline(model, config)
    with _out_of_memory_explained(config.batch_size):
        results = measure(pipeline, replace(config, output_dir=str(folder)), ema=ema)
    if state.is_main_process:
        if config.update_card and (folder / "model_index.json").is_file():
            write_card(folder, CardFacts(results=[result.for_card() for result in results]))
        print(f"The results are in {folder / RESULTS_FILE}, with plots beside it.")
    return folder / RESULTS_FILE


def calibrate(model: str, config: CalibrateConfig) -> Path:
    """Calibrate a model on images and save it; returns its folder."""
    from .data.dataset import load_images
    from .evaluation.calibration import calibrate as measure
    from .evaluation.calibration import save_calibrated, steps_table
    from .evaluation.real_images import loading_config
    from .evaluation.results import choose_output_dir
    from .sharing.card import write_card

    folder = choose_output_dir(model, config.output_dir)
    state = _processes()
    pipeline = _load_pipeline(model, config)
    images = load_images(loading_config(pipeline.unet, config, config.seed), show_progress=state.is_main_process)
    count = config.num_images
    if count > len(images):
        raise ValueError(f"`num_images` is {count}, but {images.name} has {len(images)}: lower it.")
    batch = next(images.batches(0, count, count, config.seed))
    with _out_of_memory_explained(config.batch_size):
        calibration = measure(
            pipeline,
            batch.pixels,
            num_images=count,
            seed=config.seed,
            batch_size=config.batch_size,
            class_labels=batch.labels,
        )
    if state.is_main_process:
        save_calibrated(pipeline, folder)
        write_card(folder)
        worst = float((calibration.x_0_error_standard_error / calibration.x_0_error).max())
        print(
            f"{steps_table(pipeline.scheduler)}\nThe standard errors of x̂_0's errors are at most {worst:.1%} of them."
        )
        print(f"The calibrated model is in {folder}/; sample from it with --spacing optimal --variance_type optimal.")
    return folder


def push(model: str, repo_id: str, config: PushConfig) -> str:
    """Push the model in a folder; returns the URL of the commit or pull request."""
    from .sharing.card import CardFacts
    from .sharing.hub import HubTarget
    from .sharing.push import push_folder, resume_command, upload_plan

    target = HubTarget(
        repo_id,
        config.hub_token,
        config.private,
        config.revision,
        config.tag,
        create_pr=config.create_pr,
        share_training_images=config.share_training_images,
    )
    facts = CardFacts(license=config.license)
    if config.dry_run:
        print("\n".join([f"To {repo_id}, in one commit:", *upload_plan(Path(model), target, facts)]))
        return ""
    try:
        url = push_folder(Path(model), target, facts)
    except OSError as error:
        raise OSError(f"{error}\nTry again with:\n  {resume_command(Path(model), target)}") from error
    print(f"Pushed: {url}")
    return url


def convert(source: str, destination: str, config: ConvertConfig) -> Path:
    """Convert a model into a new folder; returns the folder."""
    from .sharing.conversion.convert import convert_model

    folder = convert_model(source, Path(destination), config)
    print(f"Converted {source} to {folder}; the outputs are equal.")
    print(f"Sample with:\n  ddpm-hf sample {shlex.quote(str(folder))}")
    return folder


def env(config: EnvConfig) -> None:
    """Print what this machine is, and what training and sampling will use of it."""
    from .training.environment import describe_environment

    print(describe_environment())


@contextmanager
def _out_of_memory_explained(batch_size: int) -> Iterator[None]:
    """Within this context, a device without memory left raises a MemoryError that says what to lower."""
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        yield
    except Exception as error:
        if not should_reduce_batch_size(error):
            raise
        raise MemoryError(
            f"{str(error).splitlines()[0]} `batch_size` is {batch_size}: pass a smaller --batch_size. What was made "
            "before is kept."
        ) from error


def _processes() -> PartialState:
    """The processes that a launcher has started, on CPUs too, where Accelerate joins them only if told to."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))  # the first to finish waits for the others


def _load_pipeline(
    model: str, config: SampleConfig | EvaluateConfig | CalibrateConfig, dtype: str = "float32"
) -> DDPMPipelineCustom:
    """The model on its device."""
    import torch

    from .storage.loading import load_pipeline

    device = _device(config.device) if config.device else _processes().device
    return load_pipeline(model, config.revision, getattr(torch, dtype)).to(device)


def _device(name: str) -> str:
    """The name of a device, if it can hold a tensor."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`device` is {name!r}, which can't be used here ({reason}): try --device cpu.") from error
    return name
