"""`examine(model)`: all findings about a model, the cheap ones first."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import UNet2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from ..config.commands import DoctorConfig
from ..data.dataset import load_images
from ..data.pixels import normalize, to_uint8
from ..diffusion.ddpm_process import to_device
from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..evaluation.real_images import labels_of_network, loading_config
from ..storage.loading import load_pipeline
from .behaviour import (
    draw_samples,
    examine_calibrated_errors,
    examine_half_precision,
    examine_samples,
    examine_unclipped,
)
from .files import examine_files, model_folder, stored_dtypes
from .finding import Finding
from .readings import FLOOR_IMAGES, LEVELS, Errors, Reading
from .scheduler import examine_scheduler, examine_variance, fitting_variance
from .training import declared_schedule, examine_training
from .weights import examine_weights


@dataclass
class Diagnosis:
    """What is known of a model after its examination."""

    findings: list[Finding] = field(default_factory=list)
    pipeline: DDPMPipelineCustom | None = None  # None: it can't be loaded
    table: str = ""  # of errors by noise level, with a data set

    @property
    def faults(self) -> list[Finding]:
        """The findings that make the model worse than it should be."""
        return [finding for finding in self.findings if finding.severity == "fault"]


@torch.no_grad()
def examine(model: str, config: DoctorConfig, device: torch.device | str = "cpu") -> Diagnosis:
    """Examine a model: a folder, a training checkpoint or a model on the Hub.

    Args:
        config: without images, only files, weights, scheduler and a few samples are examined.

    Raises:
        ValueError: if there is no such model, or the images can't be read.
    """
    diagnosis = Diagnosis()
    folder = model_folder(_local_folder(model, config.revision))
    diagnosis.findings += examine_files(folder)
    try:
        pipe = _load(folder, all(finding.repair for finding in diagnosis.faults)).to(device)
    except (ValueError, OSError) as error:
        if not diagnosis.faults:
            diagnosis.findings.append(
                Finding("not loadable", "The model can't be loaded.", str(error), "Nothing works.",
                        "Save or download it again.")
            )  # fmt: skip
        return diagnosis
    diagnosis.pipeline = pipe
    images, classes = _load_images(pipe, config) if config.has_images else (None, None)
    x_0 = None if images is None else images[: config.num_images]
    checkpoint = None if config.checkpoint is None else Path(config.checkpoint)
    diagnosis.findings += examine_weights(
        {name: w.float().cpu() for name, w in pipe.unet.state_dict().items()}, stored_dtypes(folder), folder, checkpoint
    )
    declared = DDPMSchedulerCustom.load_config(folder, subfolder="scheduler")
    diagnosis.findings += examine_variance(str(declared.get("variance_type")), pipe.unet)
    diagnosis.findings += examine_scheduler(pipe.scheduler, x_0)
    if any(finding.name in ("not finite", "outlier") for finding in diagnosis.findings):  # which hide all else
        return diagnosis
    trusted = False
    if images is not None and x_0 is not None:
        errors = Errors(pipe.unet, to_device(x_0, pipe.unet.device), classes, config.batch_size, config.seed)
        of_training = list(examine_training(pipe.scheduler, pipe.unet, errors))
        diagnosis.findings += of_training
        diagnosis.table = _table(pipe, errors, images)
        trusted = not of_training
        if trusted:
            diagnosis.findings += examine_unclipped(pipe, errors)
            diagnosis.findings += examine_calibrated_errors(pipe, errors)
            diagnosis.findings += examine_half_precision(pipe, errors)
    if config.num_samples and _can_sample(diagnosis.findings):
        samples = normalize(draw_samples(_plain(pipe), config.num_samples, config.seed, config.batch_size).cpu())
        diagnosis.findings += examine_samples(samples, images, trusted and not diagnosis.faults)
    return diagnosis


def _local_folder(model: str, revision: str | None) -> Path:
    """The folder of a model, downloaded if it is on the Hub; without pickles where there are safetensors."""
    if Path(model).is_dir():
        if revision is not None:
            raise ValueError(f"`revision` is {revision!r}, but {model!r} is a folder: leave it out.")
        return Path(model)
    patterns = ["*.json", "unet/*.safetensors", "unet/*.bin"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"there is no model {model!r}: no such folder, and the Hub can't provide it ({str(error).splitlines()[0]})."
        ) from error


def _load(folder: Path, has_sound_parts: bool) -> DDPMPipelineCustom:
    """The model as it is, but for what no pipeline takes: a variance that does not fit, or a wrong index of parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are findings
        try:
            pipe = load_pipeline(str(folder))
        except ValueError as error:
            is_variance = "does not fit `variance_type`" in str(error)
            if not (is_variance or has_sound_parts):
                raise
            unet = UNet2DModel.from_pretrained(folder, subfolder="unet")
            config = DDPMSchedulerCustom.load_config(folder, subfolder="scheduler")
            variance = fitting_variance(unet) if is_variance else {}
            pipe = DDPMPipelineCustom(unet, DDPMSchedulerCustom.from_config({**config, **variance}))
        if not isinstance(pipe.scheduler, DDPMSchedulerCustom):
            pipe.scheduler = DDPMSchedulerCustom.from_config(pipe.scheduler.config)
    return pipe


def _load_images(pipe: DDPMPipelineCustom, config: DoctorConfig) -> tuple[Tensor, Tensor | None]:
    """Images in [-1, 1], as many as the floor is computed from, and the labels of those that are measured on."""
    images = load_images(loading_config(pipe.unet, config, config.seed), show_progress=False)
    if config.num_images > len(images):
        raise ValueError(
            f"`num_images` is {config.num_images}, but {images.name} has {len(images)}: lower --num_images."
        )
    count = min(len(images), max(FLOOR_IMAGES, config.num_images))
    batch = next(images.batches(0, count, count, config.seed))
    labels = labels_of_network(batch.labels, images.label_names, pipe.unet)
    labels = None if labels is None else labels[: config.num_images]
    if pipe.unet.config.num_class_embeds is not None and labels is None:
        raise ValueError("the network is class-conditional: name the labels of the images with --label_column.")
    classes = None if labels is None else pipe.prepare_class_labels(labels, config.num_images, guidance_scale=1.0)
    return normalize(to_uint8(normalize(batch.pixels))), classes


def _plain(pipe: DDPMPipelineCustom) -> DDPMPipelineCustom:
    """The pipeline with a spacing and a variance that have faults of their own no more."""
    config = {**pipe.scheduler.config, "timestep_spacing": "linspace", **fitting_variance(pipe.unet)}
    config.pop("_calibration", None)
    return DDPMPipelineCustom(pipe.unet, DDPMSchedulerCustom.from_config(config))


def _can_sample(findings: list[Finding]) -> bool:
    return not any(finding.name == "zero terminal SNR" for finding in findings)


def _table(pipe: DDPMPipelineCustom, errors: Errors, images: Tensor) -> str:
    """Errors by noise level, as declared, by prediction type, beside the floor and a linear guess."""
    declared = Reading(declared_schedule(pipe.scheduler), pipe.scheduler.config.prediction_type)
    kinds = ("epsilon", "sample", "v_prediction")
    columns = [errors.of(replace(declared, prediction_type=kind)).mean(1) for kind in kinds]
    rows = [
        f"E‖x_0 - x̂_0‖²/d on {len(errors.x_0)} images, by log-SNR (the scheduler says {declared.prediction_type}):",
        f"{'log-SNR':>8} {'t':>6} {'floor':>10} {'epsilon':>10} {'sample':>10} {'v':>10} {'linear guess':>13}",
    ]
    floor, trivial = errors.floor(images), errors.trivial()
    for i, level in enumerate(LEVELS):
        t, measured = declared.schedule.label(level), " ".join(f"{float(c[i]):10.4g}" for c in columns)
        rows.append(f"{level:8.1f} {t:6.0f} {float(floor[i]):10.4g} {measured} {float(trivial[i]):13.4g}")
    return "\n".join(rows)
