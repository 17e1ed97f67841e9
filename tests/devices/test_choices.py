"""What `auto` takes on a GPU depends on what the machine has."""

import importlib.util

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from ddpm_hf.config.training import TrainConfig
from ddpm_hf.sampling import fast
from ddpm_hf.sampling.fast import missing_for_compilation
from ddpm_hf.training.performance import Choice, choose_compile, choose_performance
from support.pretend_gpu import PretendGpu
from support.runs import TINY_OPTIONS

GPU = torch.device("cuda")
MANY = 800_000


@pytest.fixture
def has_triton(monkeypatch):
    """Triton's absence on this machine must not decide the other cases."""

    def set_to(is_there):
        monkeypatch.setattr(fast, "find_spec", lambda name: importlib.util.find_spec("torch") if is_there else None)

    set_to(True)
    return set_to


def test_a_long_run_on_a_gpu_is_compiled_where_the_compiler_is_complete(has_triton):
    with PretendGpu():
        assert choose_compile(GPU, MANY).value == "yes"
        assert choose_compile(GPU, 100).value == "no"


def test_nothing_is_compiled_without_triton_a_c_compiler_or_a_gpu_that_triton_knows(has_triton, monkeypatch, tmp_path):
    with PretendGpu(capability=(6, 1)):
        choice = choose_compile(GPU, MANY)
        assert choice == ("no", "because torch.compile needs a GPU of compute capability 7.0; this one has 6.1")
    with PretendGpu():
        has_triton(False)
        assert choose_compile(GPU, MANY) == ("no", "because torch.compile needs Triton")
        has_triton(True)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
        assert choose_compile(GPU, MANY) == ("no", "because torch.compile needs a C compiler")
        compiler = tmp_path / "my-cc"
        compiler.touch(0o755)
        monkeypatch.setenv("CC", str(compiler))
        assert missing_for_compilation(GPU) is None


def test_compile_yes_names_what_is_missing_before_anything_begins(has_triton):
    has_triton(False)
    config = TrainConfig(**{**TINY_OPTIONS, "compile": "yes"})
    with (
        PretendGpu(),
        pytest.raises(ValueError, match="`compile` is 'yes', but torch.compile needs Triton: install it"),
    ):
        choose_performance(config, Choice("no"), Accelerator(), 1, MANY)


def test_fsdp_is_not_compiled_unasked(has_triton):
    config = TrainConfig(**{**TINY_OPTIONS, "compile": "auto", "channels_last": "auto"})
    with PretendGpu():
        accelerator = Accelerator()
        assert choose_performance(config, Choice("no"), accelerator, 1, MANY).compiled
        accelerator.state.distributed_type = DistributedType.FSDP
        assert not choose_performance(config, Choice("no"), accelerator, 1, MANY).compiled
