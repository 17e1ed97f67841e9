import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 48 grey images, which all machines see."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (48, 16, 16), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder
