"""What a model is worth: bits/dim, the quality of its samples, and whether they are copies of training images."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..config.commands import EvaluateConfig
from ..data.pictures import check_plotting
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..sampling.generate import check_options
from ..storage.checkpoint import MANIFEST
from ..storage.files import check_writable, lock_output_dir
from ..storage.weights import hash_weights
from .metrics.features import CHANNELS, INCEPTION, open_extractor
from .metrics.measure import INCEPTION_METRICS, OTHER_METRICS, check_metrics
from .phases import (
    NEIGHBOURS,
    Evaluation,
    make_samples,
    measure_likelihood,
    measure_memorization,
    measure_quality,
)
from .real_images import load_real_images
from .results import MetricsFile, markdown_table

SAMPLE_FREE = {"bpd"}  # metrics that need no samples
EXTRACTOR_FREE = {"bpd", "nearest"}


def evaluate(
    pipeline: DDPMPipelineCustom,
    place: Path,
    config: EvaluateConfig,
    call_options: dict[str, Any],
    ema: bool | None = None,
) -> MetricsFile:
    """Measure a model, and write `metrics.json` and pictures.

    What an earlier run with these options has finished is not measured again; one that was killed is gone on with.
    All processes must call it; they share the work.

    Args:
        pipeline: on its device, with its weights as they are stored; they are cast to `config.dtype`.
        place: the folder for the results.
        config: what to measure, on what.
        call_options: how samples are made: `num_inference_steps`, `timesteps`, `eta`, `solver_order`, `guidance_scale`.
        ema: whether the weights are an average, where that is known.

    Returns:
        The figures, as `metrics.json` has them.

    Raises:
        ValueError: before anything is measured, for all that can't work; says what to do.
        OSError: where results can't be written.
    """
    # 1. Everything that can be wrong
    state = PartialState()
    job = prepare(pipeline, place, config, call_options, ema)

    # 2. What it will cost
    if state.is_main_process:
        notes = dict.fromkeys(note for data in (job.train, job.unseen) if data for note in data.notes)
        tqdm.write("\n".join([*(f"Note: {note}." for note in notes), estimate(job)]))
    state.wait_for_everyone()  # all know what is there, before it becomes more

    # 3. Measure
    lock = lock_output_dir(job.kept) if state.is_main_process else None
    try:
        if "bpd" in job.metrics:
            measure_likelihood(job)
        if set(job.metrics) - SAMPLE_FREE:
            samples = make_samples(job)
            if set(job.metrics) - EXTRACTOR_FREE:
                measure_quality(job, samples)
            if "nearest" in job.metrics:
                measure_memorization(job, samples)
    finally:
        if lock is not None:
            lock.release()

    # 4. Tell
    if state.is_main_process:
        tqdm.write(markdown_table(job.figures.figures))
    return job.figures


def evaluation_place(model: str, output_dir: str | None) -> Path:
    """The folder for the results: the model's own, unless `output_dir` names another one.

    Raises:
        ValueError: for a model without a folder of its own that files could be added to, and for that of another model.
    """
    place = Path(model if output_dir is None else output_dir)
    if (place / "model_index.json").is_file() and place.resolve() != Path(model).resolve():
        raise ValueError(f"`output_dir` {str(output_dir)!r} holds another model: choose another --output_dir.")
    if output_dir is None and (not (place / "model_index.json").is_file() or (place / MANIFEST).is_file()):
        raise ValueError(
            f"{model!r} is no saved pipeline on this machine that results could be added to (checkpoints stay as they "
            "are): pass --output_dir FOLDER."
        )
    check_writable(place)
    return place


def prepare(
    pipeline: DDPMPipelineCustom,
    place: Path,
    config: EvaluateConfig,
    call_options: dict[str, Any],
    ema: bool | None = None,
) -> Evaluation:
    """Check everything, cheap things first, and load the images.

    Raises:
        ValueError: for all that can't work.
    """
    check_plotting()
    figures = MetricsFile(place / "metrics.json", hash_weights(pipeline.unet))
    torch.nn.Module.to(pipeline.unet, getattr(torch, config.dtype))  # diffusers' own warns, of no module at all
    channels = pipeline.unet.config.in_channels
    metrics = config.chosen_metrics or default_metrics(config.feature_extractor, channels)
    extracted = [name for name in metrics if name not in EXTRACTOR_FREE]
    check_metrics(extracted, config.feature_extractor, config.num_images)
    needs_extractor = bool(extracted) or config.feature_extractor is not None
    if needs_extractor and channels not in CHANNELS:
        raise ValueError(
            f"the model's images have {channels} channels, but feature extractors know 1 (grayscale) and 3 (RGB): pass "
            "--metrics bpd,nearest, without --feature_extractor."
        )
    if "bpd" in metrics:
        _check_likelihood(pipeline, config)
    classes = pipeline.unet.config.num_class_embeds
    if classes is not None and config.label_column is None:
        raise ValueError(
            f"the model is conditional on {classes} classes: name the column of the labels, as in --label_column label."
        )
    extractor = None
    if needs_extractor:
        weights = config.inception_weights and Path(config.inception_weights)
        extractor = open_extractor(config.feature_extractor, inception_weights=weights or None, device=pipeline.device)
    train, unseen = load_real_images(pipeline.unet, config, PartialState().is_main_process)
    for data in filter(None, (train, unseen)):
        check_metrics(extracted, config.feature_extractor, config.num_images, len(data.pixels))
        if len(data.pixels) <= NEIGHBOURS:
            raise ValueError(f"{data.name} ({data.split}) has {len(data.pixels)} images: an evaluation needs more.")
    labels = config.class_label
    if classes is not None and labels is None:
        labels = list(range(train.num_classes or classes))
    for steps in (call_options["num_inference_steps"], config.likelihood_steps):
        check_options(pipeline, labels, **call_options | {"num_inference_steps": steps})
    return Evaluation(pipeline, place, config, metrics, train, unseen, extractor, call_options, labels, figures, ema)


def _check_likelihood(pipeline: DDPMPipelineCustom, config: EvaluateConfig) -> None:
    """Raise a ValueError for a model without a likelihood, and for an estimate by more calls than the chain has."""
    if not isinstance(pipeline.scheduler, DDPMSchedulerCustom):
        raise ValueError(
            f"the model's scheduler is a {type(pipeline.scheduler).__name__}, but bits/dim are those of a "
            "DDPMScheduler: leave bpd out, as in --metrics nearest, or name a DDPMScheduler in its model_index.json."
        )
    K, calls = config.likelihood_steps or len(pipeline.scheduler), config.calls_per_image
    if calls is not None and calls >= K:
        raise ValueError(
            f"`calls_per_image` is {calls}, but an estimate needs fewer calls than the {K} steps of the chain: lower "
            "it, or leave --calls_per_image out for the exact bound."
        )


def default_metrics(feature_extractor: str | None, channels: int) -> list[str]:
    """What can be measured on images of so many channels, with what is installed and named."""
    if feature_extractor is not None and feature_extractor != INCEPTION:
        return ["bpd", *OTHER_METRICS, "nearest"]
    has_inception = channels in CHANNELS and importlib.util.find_spec("torch_fidelity") is not None
    return ["bpd", *(INCEPTION_METRICS if has_inception else ()), "nearest"]


def estimate(job: Evaluation) -> str:
    """What the network calls of an evaluation will cost, from the time of one of them on this process."""
    config, num_processes = job.config, PartialState().num_processes
    seconds = time_network_call(job.pipeline, config.batch_size)
    T = job.pipeline.scheduler.config.num_train_timesteps
    rows = []
    if "bpd" in job.metrics:
        calls = config.calls_per_image or config.likelihood_steps or T
        rows.append(("Likelihood", job.num_likelihood_images, calls))
    if set(job.metrics) - SAMPLE_FREE:
        steps = len(check_options(job.pipeline, job.class_labels, **job.call_options))
        rows.append(("Samples", config.num_images, steps * (1 if job.call_options["guidance_scale"] == 1 else 2)))
    lines = [
        f"{name}: {images:,} images of {calls:,} network calls each, about "
        f"{math.ceil(images / config.batch_size / num_processes) * calls * seconds / 60:,.1f} minutes"
        for name, images, calls in rows
    ]
    return "\n".join([*lines, "What an earlier run has finished is taken from there."])


def time_network_call(pipeline: DDPMPipelineCustom, batch_size: int) -> float:
    """Seconds of one call with a batch of images, the one before it not counted."""
    network = pipeline.unet
    shape = batch_size, network.config.in_channels, *image_size(network)
    x = torch.zeros(shape, device=network.device, dtype=network.dtype)
    t = torch.zeros(batch_size, dtype=torch.long, device=network.device)
    labels = t if network.config.num_class_embeds is not None else None
    with torch.no_grad():
        for _ in range(2):
            started = time.perf_counter()
            float(network(x, t, class_labels=labels, return_dict=False)[0].float().mean())  # waits for a GPU, too
    return time.perf_counter() - started
