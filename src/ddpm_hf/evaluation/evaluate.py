"""What a model is worth: bits/dim, the quality of its samples, and whether they are copies of training images."""

from __future__ import annotations

import copy
import importlib.util
import math
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..config.commands import EvaluateConfig
from ..data.pictures import check_plotting
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..distributed import Agreement
from ..progress import write
from ..sampling.generate import check_options, parse_labels
from ..storage.files import check_writable, lock_output_dir
from ..storage.weights import hash_weights
from .metrics.features import CHANNELS, INCEPTION, Extractor, open_extractor
from .metrics.measure import INCEPTION_METRICS, OTHER_METRICS, check_metrics
from .phases import (
    EXTRACTOR_FREE,
    NEIGHBOURS,
    Evaluation,
    measure_likelihood,
    measure_memorization,
    measure_quality,
)
from .real_images import load_real_images
from .results import RESULTS_FILE, Result, markdown_table, read_results


def evaluate(pipeline: DDPMPipelineCustom, config: EvaluateConfig, *, ema: bool | None = None) -> list[Result]:
    """Measure a model; write `metrics.json`, plots and samples into `config.output_dir`.

    Results of an earlier run with the same options are reused, and an interrupted run resumes. All processes must call
    it; they share the work.

    Args:
        pipeline: on its device; it stays unchanged.
        config: what to measure, on what. `device`, `revision` and `update_card` are for the command `ddpm-hf evaluate`,
            and play no part here.
        ema: whether the weights are an average (EMA), to be noted beside the results.

    Returns:
        All results of these weights in `config.output_dir`, in the order in which they were measured: `print` them, or
        read `metric`, `value`, `title`, `warnings`, …

    Raises:
        ValueError: before anything is measured, for options, data and models that don't fit; states what to do.
        OSError: if results can't be written.
    """
    # 1. Check everything, and load the images
    job, state = prepare(pipeline, config, ema), PartialState()

    # 2. Say what it will cost
    if state.is_main_process:
        notes = dict.fromkeys(note for data in (job.train, job.unseen) if data for note in data.notes)
        write("\n".join([*(f"Note: {note}." for note in notes), estimate(job)]))

    # 3. Measure what is missing
    with Agreement(state.num_processes).together():
        lock = lock_output_dir(job.cache, state.is_main_process)
    with lock:
        measure_likelihood(job)
        measure_quality(job)
        measure_memorization(job)

    # 4. Report
    results = broadcast_object_list([job.results])[0]
    if state.is_main_process:
        write(markdown_table(results))
    return results


def prepare(pipeline: DDPMPipelineCustom, config: EvaluateConfig, ema: bool | None = None) -> Evaluation:
    """Check everything, cheap things first, and load the images.

    Raises:
        ValueError: for all that can't work.
    """
    if config.output_dir is None:
        raise ValueError("`output_dir` is not set: name the folder for results, as in output_dir='evaluated'.")
    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    check_plotting()
    weights = hash_weights(pipeline.unet)
    results = read_results(output_dir / RESULTS_FILE, weights)
    metrics = config.chosen_metrics or default_metrics(config.feature_extractor, pipeline.unet.config.in_channels)
    distances = [name for name in metrics if name not in EXTRACTOR_FREE]
    check_metrics(distances, config.feature_extractor, config.num_images)
    if "bpd" in metrics:
        _check_likelihood(pipeline, config)
    classes = pipeline.unet.config.num_class_embeds
    if classes is not None and config.label_column is None:
        raise ValueError(
            f"the model is conditional on {classes} classes: name the column of the labels, as in --label_column label."
        )
    needs_extractor = bool(distances) or config.feature_extractor is not None
    extractor = _open_extractor(pipeline, config) if needs_extractor else None
    train, unseen = load_real_images(pipeline.unet, config, PartialState().is_main_process)
    for data in filter(None, (train, unseen)):
        check_metrics(distances, config.feature_extractor, config.num_images, len(data.pixels))
        if len(data.pixels) <= NEIGHBOURS:
            raise ValueError(f"{data.name} ({data.split}) has {len(data.pixels)} images: an evaluation needs more.")
    labels = parse_labels(config.class_label, pipeline.unet.config)
    if classes is not None and labels is None:
        labels = train.classes
    pipeline = _with_options(pipeline, config)
    for steps in (config.num_inference_steps, config.likelihood_steps):
        check_options(pipeline, labels, **config.call_options() | {"num_inference_steps": steps})
    return Evaluation(
        pipeline, output_dir, config, metrics=metrics, train=train, unseen=unseen, extractor=extractor,
        class_labels=labels, weights=weights, results=results, ema=ema,
    )  # fmt: skip


def _with_options(pipeline: DDPMPipelineCustom, config: EvaluateConfig) -> DDPMPipelineCustom:
    """A pipeline with the precision, the spacing and the variance of the options; the given one stays unchanged."""
    unet, dtype = pipeline.unet, getattr(torch, config.dtype)
    if unet.dtype != dtype:
        unet = copy.deepcopy(unet)
        torch.nn.Module.to(unet, dtype)  # diffusers' own method warns about float16 on a CPU
    return DDPMPipelineCustom(unet, config.configure(pipeline.scheduler))


def _open_extractor(pipeline: DDPMPipelineCustom, config: EvaluateConfig) -> Extractor:
    channels = pipeline.unet.config.in_channels
    if channels not in CHANNELS:
        raise ValueError(
            f"the model's images have {channels} channels, but feature extractors take 1 (grayscale) or 3 (RGB): pass "
            "--metrics bpd,nearest, without --feature_extractor."
        )
    weights = Path(config.inception_weights) if config.inception_weights else None
    return open_extractor(config.feature_extractor, inception_weights=weights, device=pipeline.device)


def _check_likelihood(pipeline: DDPMPipelineCustom, config: EvaluateConfig) -> None:
    """Raise a ValueError for a model without a likelihood, and for an estimate by more calls than the chain has."""
    if not isinstance(pipeline.scheduler, DDPMSchedulerCustom):
        raise ValueError(
            f"the model's scheduler is a {type(pipeline.scheduler).__name__}, but bits/dim need a DDPMScheduler: leave "
            "bpd out, as in --metrics nearest, or name a DDPMScheduler in its model_index.json."
        )
    K, calls = config.likelihood_steps or len(pipeline.scheduler), config.calls_per_image
    if calls is not None and calls >= K:
        raise ValueError(
            f"`calls_per_image` is {calls}, but an estimate needs fewer calls than the {K} steps of the chain: lower "
            "it, or leave --calls_per_image out for the exact bound."
        )


def default_metrics(feature_extractor: str | None, channels: int) -> list[str]:
    """The metrics that installed packages and the named extractor allow for images of this number of channels."""
    if feature_extractor is not None and feature_extractor != INCEPTION:
        return ["bpd", *OTHER_METRICS, "nearest"]
    has_inception = channels in CHANNELS and importlib.util.find_spec("torch_fidelity") is not None
    return ["bpd", *(INCEPTION_METRICS if has_inception else ()), "nearest"]


def estimate(job: Evaluation) -> str:
    """How long the network calls of an evaluation will take, from the time of one of them on this process."""
    config, num_processes = job.config, PartialState().num_processes
    seconds = time_network_call(job.pipeline, config.batch_size)
    T = job.pipeline.scheduler.config.num_train_timesteps
    rows = []
    if "bpd" in job.metrics:
        calls = config.calls_per_image or config.likelihood_steps or T
        rows.append(("Likelihood", job.num_likelihood_images, calls))
    if set(job.metrics) != {"bpd"}:
        calls = job.sampling["num_inference_steps"] * (1 if config.guidance_scale == 1 else 2)
        rows.append(("Samples", config.num_images, calls))
    lines = [
        f"{name}: {images:,} images of {calls:,} network calls each, about "
        f"{math.ceil(images / config.batch_size / num_processes) * calls * seconds / 60:,.1f} minutes"
        for name, images, calls in rows
    ]
    return "\n".join([*lines, "Results of earlier runs with the same options are reused."])


def time_network_call(pipeline: DDPMPipelineCustom, batch_size: int) -> float:
    """Seconds of one call with a batch of images, after one to warm up."""
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
