"""A small model, and images that it can hold."""

import numpy as np
import pytest
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from support.codec import smooth_images
from support.models import tiny_unet

pytest.importorskip("constriction")


@pytest.fixture(scope="session")
def pipeline():
    return DDPMPipelineCustom(tiny_unet(1), DDPMSchedulerCustom(20, beta_schedule="squaredcos_cap_v2"))


@pytest.fixture(scope="session")
def model_folder(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def image_files(tmp_path):
    """Twelve PNGs."""
    folder = tmp_path / "images"
    folder.mkdir()
    files = []
    for i, pixels in enumerate(smooth_images(12)):
        files.append(folder / f"blob-{i:03}.png")
        Image.fromarray(np.asarray(pixels[0])).save(files[-1])
    return files
