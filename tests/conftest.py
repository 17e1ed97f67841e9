import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded in tests
os.environ["PYTHONPATH"] = os.pathsep.join(  # processes that tests start import `support`, too
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

import pytest
import torch

from support.models import tiny_unet

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def make_unet():
    return tiny_unet
