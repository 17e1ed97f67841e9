"""Table 1: bits/dim and the distance of samples to real images, beside how they were measured."""

from __future__ import annotations

from pathlib import Path

import torch

from ..evaluation.metrics.distances import frechet_distance, frechet_estimate, moments
from ..evaluation.metrics.measure import SMALLEST_SET, measure
from ..evaluation.metrics.reference_statistics import reference_statistics
from .figure import Drawn, PaperFigure
from .job import Job


def _draw(job: Job, file: Path) -> Drawn:
    data, bits = job.held_out, job.bits
    seen = "unseen images" if job.unseen else "images that the model was trained on"
    samples = job.samples.images
    features = job.features(samples)
    value, error, bias = frechet_estimate(features, job.features(data.pixels), job.real_moments)
    order = torch.randperm(len(data.pixels), generator=torch.Generator().manual_seed(job.config.seed))
    count = min(len(samples), len(data.pixels) // 2)
    some, others = data.pixels[order[:count]], data.pixels[order[count:]]
    floor = frechet_distance(moments(job.features(some)), moments(job.features(others)))
    how = f"{len(samples)} samples of {job.steps} steps, {len(data.pixels):,} real images; {job.feature_name}"
    table = [
        ["", "value", "how it was measured"],
        ["NLL (bits/dim)", f"≤ {bits.total:.3f} ± {bits.standard_error:.3f}",
         f"the bound of Eq. 5, all {job.T} terms, {bits.num_images} {seen}; variance {bits.variance_type}"],
        ["Fréchet distance", f"{value:.3g} ± {error:.2g}", f"{how}; about {bias:.2g} of it is finite-sample bias"],
        ["… of real images", f"{floor:.3g}", f"for scale: {count} real images against the {len(others):,} others"],
    ]  # fmt: skip
    extractor = job.extractor
    if extractor is not None and extractor.num_logits and len(samples) >= SMALLEST_SET["isc"]:
        reference = reference_statistics(
            data.pixels, extractor, pixels_hash=data.pixels_hash, cache_dir=None, batch_size=job.config.batch_size
        )
        (score,) = measure(["isc"], extractor(samples, job.config.batch_size), reference, extractor)
        table.insert(2, ["Inception Score", score.numbers(), how])
    return Drawn({"seen": seen, "features": job.feature_name, "count": len(samples)}, table)


FIGURE = PaperFigure(
    name="scores",
    title="Likelihood and sample quality",
    place="Table 1",
    text="The likelihood is a bound, in bits per dimension, on {seen}. "
    "The Fréchet distance compares {count} samples with the real images in {features}; only in Inception's "
    "features, and with as many samples, is it the FID that papers print. "
    "`ddpm-hf evaluate` measures both with more images, writes them into the model's card, and adds KID, "
    "precision and recall.",
    functions=("ddpm_hf.bits_per_dim", "ddpm_hf.evaluation.metrics.distances.frechet_estimate"),
    draw=_draw,
    options=(
        "num_images", "num_inference_steps", "batch_size", "feature_extractor", "num_likelihood_images",
    ),
    needs_images=True,
    uses_samples=True,
    has_picture=False,
)  # fmt: skip
