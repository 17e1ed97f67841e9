import pytest
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from support.small_training import COSINE, tinted_digits, train_small


@pytest.fixture(scope="session")
def trained():
    """The last weights, and their average."""
    return train_small()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """A folder of 256 tinted digits."""
    folder = tmp_path_factory.mktemp("digits")
    for i, picture in enumerate(tinted_digits()[:256]):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture(scope="session")
def good_model(trained, tmp_path_factory):
    """A saved model without a fault. Copy it before you plant one."""
    folder = tmp_path_factory.mktemp("model") / "good"
    DDPMPipelineCustom(trained[1], DDPMSchedulerCustom(**COSINE)).save_pretrained(folder)
    return folder
