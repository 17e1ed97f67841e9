"""Table 2: what the network predicts × the objective × the reverse variance, in six small training runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.training import TrainConfig
from ..evaluation.likelihood import bits_per_dim
from ..evaluation.metrics.distances import frechet_distance, moments
from ..evaluation.real_images import loading_config
from ..progress import write
from ..sampling.generate import sample_pixels
from ..storage.loading import load_pipeline
from ..training.loop import train
from .figure import Drawn, PaperFigure
from .job import Job

RUNS = tuple(
    (prediction, *choice)
    for prediction in ("sample", "epsilon")
    for choice in (("vlb", "learned_range"), ("vlb", "fixed_small"), ("simple", "fixed_small"))
)
NAMES = {
    "sample": "x̂_0, and so μ̃", "epsilon": "ε", "vlb": "L (Eq. 5)", "simple": "L_simple", "learned_range": "learned",
    "fixed_small": "fixed",
}  # fmt: skip
BATCH, STEPS, CALLS = 32, 100, 50  # of training; of a sample; per image, for the likelihood
PASSES = 3  # a training update costs as much as about three network calls
NETWORK = (
    "block_out_channels", "layers_per_block", "down_block_types", "up_block_types", "norm_num_groups", "dropout",
    "attention_head_dim", "add_attention",
)  # fmt: skip


def run_config(job: Job, prediction: Any, objective: Any, variance: Any) -> TrainConfig:
    """The options of one run: a new network like the model's, on the same images, with the same process."""
    unet, scheduler = job.pipeline.unet.config, job.pipeline.scheduler.config
    shape = {name: list(v) if isinstance(v := unet[name], (list, tuple)) else v for name in NETWORK}
    return replace(
        loading_config(job.pipeline.unet, job.config, job.config.seed),
        output_dir=str(job.folder("ablation", "ablation_updates") / f"{prediction}-{objective}-{variance}"),
        unet={name: value for name, value in shape.items() if value is not None},
        prediction_type=prediction,
        objective=objective,
        variance_type=variance,
        ddpm_num_steps=job.T,
        ddpm_beta_schedule=scheduler.beta_schedule,
        ddpm_num_inference_steps=min(STEPS, job.T),
        train_batch_size=BATCH,
        max_train_steps=job.config.ablation_updates,
        learning_rate=1e-3,
        lr_warmup_steps=0,
        use_ema=True,
        ema_max_decay=0.99,
        checkpointing_steps=job.config.ablation_updates,
        save_images_steps=0,
        calibration_images=0,
        report_to=["none"],
        resume_from_checkpoint="latest",
    )


def _measure(job: Job, folder: Path) -> tuple[str, str]:
    pipeline = load_pipeline(str(folder)).to(job.pipeline.device)
    data, T = job.held_out, job.T
    conditional = pipeline.unet.config.num_class_embeds is not None
    bits = bits_per_dim(
        pipeline, data.pixels, num_images=job.num_likelihood_images, calls_per_image=CALLS if CALLS < T else None,
        seed=job.config.seed, batch_size=job.config.batch_size, class_labels=data.labels if conditional else None,
        show_progress=False,
    )  # fmt: skip
    made = sample_pixels(
        pipeline, job.config.num_images, job.config.seed, job.config.batch_size,
        class_labels=job.labels(job.config.num_images), num_inference_steps=min(STEPS, T),
    )  # fmt: skip
    samples = torch.cat([pixels for _, pixels in made])
    distance = frechet_distance(moments(job.features(samples)), job.real_moments)
    return f"{bits.total:.2f} ± {bits.standard_error:.2f}", f"{distance:.3g}"


def _draw(job: Job, file: Path) -> Drawn:
    table = [["the network predicts", "objective", "variance", "bits/dim", "Fréchet distance"]]
    for number, choice in enumerate(RUNS):
        config = run_config(job, *choice)
        folder = Path(config.output_dir)
        if not (folder / "model_index.json").is_file():
            write(f"Network {number + 1} of {len(RUNS)}: {', '.join(NAMES[name] for name in choice)}")
            with torch.enable_grad():
                train(config)
        table.append([*(NAMES[name] for name in choice), *_measure(job, folder)])
    return Drawn(
        {
            "updates": job.config.ablation_updates,
            "batch": BATCH,
            "steps": min(STEPS, job.T),
            "features": job.feature_name,
        },
        table,
    )


FIGURE = PaperFigure(
    name="ablation",
    title="Objectives, predictions and variances",
    place="Table 2",
    text="Six networks like the model's, trained here from scratch for {updates} updates with batches of {batch}, "
    "differ in what they predict, in what they minimise and in whether they learn the reverse variance. "
    "Bits/dim are the bound of Eq. 5, and the Fréchet distance of samples in {steps} steps is in {features}; "
    "the paper's networks were trained 800,000 updates, and so short a run shows a tendency at best. "
    "A prediction of x̂_0 is one of μ̃ in the units of images (Eq. 7), and our learned variance lies between β̃"
    " and β, where the paper's was free and unstable.",
    functions=("ddpm_hf.train", "ddpm_hf.bits_per_dim"),
    draw=_draw,
    options=("ablation_updates", "num_images", "num_likelihood_images", "batch_size", "feature_extractor"),
    needs_images=True,
    calls=lambda job: (
        len(RUNS)
        * (
            job.config.ablation_updates * BATCH * PASSES
            + job.config.num_images * min(STEPS, job.T)
            + job.num_likelihood_images * min(CALLS, job.T)
        )
    ),
    has_picture=False,
    is_optional=True,
)
