"""Measure by all processes that torchrun starts: evaluations, a calibration, a likelihood, and features.

python measure_together.py FOLDER EXTRACTOR OPTIONS_OF_EVALUATE, whose results are in FOLDER/shared, FOLDER/RANK and
FOLDER/measured-RANK.
"""

import sys
from pathlib import Path

import torch

from ddpm_hf.cli import main
from ddpm_hf.commands.model import processes
from ddpm_hf.evaluation.calibration import calibrate
from ddpm_hf.evaluation.likelihood import bits_per_dim
from ddpm_hf.evaluation.metrics.features import open_extractor
from support.oracle import gaussian_images, oracle_pipeline


def measure(extractor):
    """A calibration, a likelihood, and the features of 21 images and of 2, which are fewer than a batch."""
    pipe, images = (
        oracle_pipeline(0.1, num_train_timesteps=10, beta_schedule="squaredcos_cap_v2"),
        gaussian_images(0.1, 21),
    )
    calibration = calibrate(pipe, images, show_progress=False)
    bits = bits_per_dim(pipe, images, calls_per_image=4, variance_type="optimal", show_progress=False)
    extract = open_extractor(extractor)
    return {
        "x_0_error": calibration.x_0_error,
        "bits": torch.tensor([bits.total, bits.standard_error, *bits.terms], dtype=torch.float64),
        "features": extract(images, batch_size=3, show_progress=False).pooled,
        "two features": extract(images[:2], batch_size=3, show_progress=False).pooled,
    }


if __name__ == "__main__":
    folder, extractor, *options = sys.argv[1:]
    main(["evaluate", *options, "--output_dir", f"{folder}/shared"])
    state = processes()
    main(["evaluate", *options, "--output_dir", f"{folder}/{state.process_index}"])
    torch.save([state.num_processes, measure(extractor)], Path(folder) / f"measured-{state.process_index}")
