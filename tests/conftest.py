import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded in tests
# One thread, here and in every process that a test starts: with more, MKL picks their number by the machine's load,
# sums change in their last digit, and two processes on two cores wait for each other tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(  # processes that tests start import `support`, too
    [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: so would all that tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture
def file_limit():
    """Files can't grow beyond so many bytes: a real failure to write, as on a full disk."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
