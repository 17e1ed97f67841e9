"""The report: every figure that the model and the images allow, in a folder with a page that explains them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..config.commands import EvaluateConfig, ImageOptions, PaperConfig
from ..data.pictures import check_plotting
from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import ZERO_SNR_ERROR, DDPMSchedulerCustom
from ..evaluation.evaluate import time_network_call
from ..evaluation.metrics.features import open_extractor
from ..evaluation.real_images import RealImages, load_real_images
from ..progress import write
from ..storage.files import check_writable, lock_output_dir, read_json, write_text_atomically
from ..storage.weights import hash_weights
from . import (
    ablation,
    embedding,
    flow,
    forward,
    interpolation,
    neighbours,
    network,
    posterior,
    progressive,
    quality,
    rate_distortion,
    samples,
    schedule,
    scores,
    shared,
)
from .figure import PaperFigure
from .job import Job, small
from .page import render

FIGURES: tuple[PaperFigure, ...] = (
    samples.FIGURE, schedule.FIGURE, forward.FIGURE, posterior.FIGURE, network.FIGURE, embedding.FIGURE,
    flow.FIGURE, progressive.STRIP, progressive.FIGURE, quality.FIGURE, rate_distortion.FIGURE, shared.FIGURE,
    interpolation.FIGURE, interpolation.COARSE_TO_FINE, neighbours.FIGURE, scores.FIGURE, ablation.FIGURE,
)  # fmt: skip
PREDICTIONS = {"epsilon": "the noise ε", "sample": "the image x_0", "v_prediction": "v (a mixture of ε and x_0)"}
RECORD = "paper.json"
PAGE = "index.html"
FEWEST = 4  # real images, for a Fréchet distance and three neighbours


def write_report(pipeline: DDPMPipelineCustom, config: PaperConfig, name: str) -> Path:
    """Draw the figures into `config.output_dir`, and write `index.html`, which holds them all.

    A figure that is there with the same model, images and options is kept; samples and likelihoods of an interrupted
    run are reused.

    Args:
        pipeline: on its device.
        config: the options.
        name: of the model, for the page.

    Returns:
        The path of the page.

    Raises:
        ValueError: before anything is computed, for options, models and images that don't fit.
    """
    output_dir = Path(config.output_dir)
    check_writable(output_dir)
    chosen = _chosen(config)
    job = prepare(pipeline, config, chosen)
    missing = {f.title: "needs real images, as in --dataset digits" for f in chosen if f.needs_images and not job.train}
    drawn = [f for f in chosen if f.title not in missing]
    with lock_output_dir(output_dir):
        record = _read_record(output_dir / RECORD)
        todo = [f for f in drawn if not _is_there(f, job, record, output_dir)]
        write(estimate(job, todo, len(drawn) - len(todo)))
        for number, figure in enumerate(todo):
            write(f"{number + 1} of {len(todo)}: {figure.title}")
            record[figure.name] = _draw(figure, job, output_dir)
            write_text_atomically(output_dir / RECORD, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
            _write_page(output_dir, drawn, record, job, name, missing)
        _write_page(output_dir, drawn, record, job, name, missing)
    return output_dir / PAGE


def prepare(pipeline: DDPMPipelineCustom, config: PaperConfig, chosen: Sequence[PaperFigure]) -> Job:
    """Check the model and the options, and load the images.

    Raises:
        ValueError: for all that can't work.
    """
    check_plotting()
    if PartialState().num_processes > 1:
        raise ValueError("`ddpm-hf paper` runs in one process: start it without a launcher.")
    scheduler, unet = pipeline.scheduler, pipeline.unet
    if not isinstance(scheduler, DDPMSchedulerCustom):
        raise ValueError(
            f"the model's scheduler is a {type(scheduler).__name__}, but the paper is about a DDPMScheduler: name one "
            "in its model_index.json."
        )
    if scheduler.process.has_zero_terminal_snr and scheduler.config.prediction_type == "epsilon":
        raise ValueError(ZERO_SNR_ERROR)
    channels = unet.config.in_channels
    if channels not in (1, 3, 4):
        raise ValueError(f"the model's images have {channels} channels, which can't be drawn: it must be 1, 3 or 4.")
    T = scheduler.process.num_train_timesteps
    if config.num_inference_steps is not None and config.num_inference_steps > T:
        raise ValueError(f"`num_inference_steps` is {config.num_inference_steps}, but the model has T = {T}: lower it.")
    train, unseen = _images(pipeline, config)
    extractor = None
    if config.feature_extractor is not None and any(f.needs_images for f in chosen):
        if channels == 4:
            raise ValueError(
                "`feature_extractor` takes images of 1 or 3 channels, but the model's have 4: leave it out."
            )
        extractor = open_extractor(config.feature_extractor, inception_weights=None, device=pipeline.device)
    work = Path(config.output_dir) / "work"
    return Job(pipeline, config, hash_weights(unet), train, unseen, extractor, work)


def _images(pipeline: DDPMPipelineCustom, config: PaperConfig) -> tuple[RealImages | None, RealImages | None]:
    if config.dataset_name is None and config.train_data_dir is None:
        return None, None
    shared_options = {f.name: getattr(config, f.name) for f in fields(ImageOptions)}
    options = EvaluateConfig(
        **shared_options, test_split=config.test_split, test_data_dir=config.test_data_dir, seed=config.seed
    )
    classes = pipeline.unet.config.num_class_embeds
    if classes is not None and config.label_column is None:
        raise ValueError(
            f"the model is conditional on {classes} classes: name the column of the labels, as in --label_column label."
        )
    train, unseen = load_real_images(pipeline.unet, options, show_progress=True)
    for data in filter(None, (train, unseen)):
        if len(data.pixels) < FEWEST:
            raise ValueError(f"{data.name} ({data.split}) has {len(data.pixels)} images, but {FEWEST} are needed.")
    return train, unseen


def _chosen(config: PaperConfig) -> list[PaperFigure]:
    if config.figures is None:
        return [f for f in FIGURES if not f.is_optional]
    names, known = [n.strip() for n in config.figures.split(",")], [f.name for f in FIGURES]
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"`figures` has {unknown[0]!r}, but must be of {','.join(known)}.")
    return [f for f in FIGURES if f.name in names]


def estimate(job: Job, figures: Sequence[PaperFigure], kept: int) -> str:
    """What the network calls of these figures will take, from the time of one of them."""
    seconds = time_network_call(job.pipeline, job.config.batch_size) / job.config.batch_size
    # The bound serves two figures, and is measured once.
    calls = {f.name: f.calls(job) for f in figures}
    if "scores" in calls and "rate_distortion" not in calls:
        calls["scores"] += rate_distortion.FIGURE.calls(job)
    if any(f.uses_samples for f in figures) or (job.train is None and figures):
        calls["samples"] = job.config.num_images * job.steps
    lines = [
        f"{name}: {count:,} images through the network, about {count * seconds / 60:.1f} minutes"
        for name, count in calls.items()
        if count
    ]
    total = sum(calls.values()) * seconds / 60
    return "\n".join([
        *lines, f"{len(figures)} figures to draw, {kept} kept from before: about {total:.1f} minutes at most.",
    ])  # fmt: skip


def _settings(figure: PaperFigure, job: Job) -> dict[str, Any]:
    from .. import __version__

    options = figure.options
    if job.train is None:  # figures that want a real image take a sample
        options = tuple(dict.fromkeys((*options, "num_images", "num_inference_steps", "batch_size")))
    return {**job.settings(*options), "version": __version__}


def _is_there(figure: PaperFigure, job: Job, record: dict[str, Any], output_dir: Path) -> bool:
    entry = record.get(figure.name)
    has_file = not figure.has_picture or (output_dir / f"{figure.name}.png").is_file()
    return has_file and isinstance(entry, dict) and entry.get("settings") == _settings(figure, job)


def _draw(figure: PaperFigure, job: Job, output_dir: Path) -> dict[str, Any]:
    job.work.mkdir(parents=True, exist_ok=True)
    unfinished, began = job.work / f"{figure.name}.png", time.perf_counter()
    with torch.no_grad():
        drawn = figure.draw(job, unfinished)
    if figure.has_picture:
        unfinished.replace(output_dir / f"{figure.name}.png")
    return {
        "settings": _settings(figure, job),
        "numbers": drawn.numbers,
        "table": [list(row) for row in drawn.table],
        "seconds": round(time.perf_counter() - began, 1),
    }


def _read_record(file: Path) -> dict[str, Any]:
    """What earlier runs have drawn; nothing if that can't be read, since all can be drawn again."""
    try:
        stored = read_json(file)
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _write_page(
    output_dir: Path,
    figures: Sequence[PaperFigure],
    record: dict[str, Any],
    job: Job,
    name: str,
    missing: dict[str, str],
) -> None:
    entries = [
        {
            "name": f.name, "title": f.title, "place": f.place, "functions": f.functions,
            "text": f.text.format(**record[f.name]["numbers"]), "table": record[f.name]["table"],
            "file": output_dir / f"{f.name}.png" if f.has_picture else None,
        }
        for f in figures
        if f.name in record and _is_there(f, job, record, output_dir)
    ]  # fmt: skip
    seconds = sum(record[e["name"]]["seconds"] for e in entries)
    data = [f"{d.name} ({d.split}, {len(d.pixels):,} images)" for d in (job.train, job.unseen) if d]
    scheduler = job.pipeline.scheduler.config
    facts = {
        "model": name,
        "images": ", ".join(data) or "none: pass --dataset for the figures that need them",
        "image size": " × ".join(map(str, small(job))),
        "process": f"{scheduler.beta_schedule}, T = {job.T}",
        "the network predicts": PREDICTIONS[scheduler.prediction_type],
        "reverse steps": str(job.steps),
        "seed": str(job.config.seed),
        "time": f"{math.ceil(seconds)} seconds for all figures, on {job.pipeline.device.type}",
    }
    write_text_atomically(
        output_dir / PAGE, render("Denoising Diffusion Probabilistic Models: the figures", facts, entries, missing)
    )
