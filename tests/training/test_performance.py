"""How the network is computed: what `auto` chooses, and that the result is the same whatever it chooses."""

import shutil
from collections import Counter

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.config.parsing import parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.diffusion import ddpm_process
from ddpm_hf.sampling import fast
from ddpm_hf.storage.checkpoint import load_checkpoint
from ddpm_hf.training import performance
from ddpm_hf.training.loop import train
from ddpm_hf.training.performance import choose_channels_last, choose_compile, choose_precision
from support.runs import TINY_OPTIONS

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LARGE, SMALL = 35_746_307, 687_347


@pytest.fixture(autouse=True)
def _one_precision_per_test():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def a_run(output_dir, **options):
    """A run in this process; returns its last checkpoint."""
    calm = {"save_images_steps": 0, "calibration_images": 0, "max_train_steps": 4, "checkpointing_steps": 2}
    config = TrainConfig(**{**TINY_OPTIONS, **calm, "output_dir": str(output_dir), **options})
    train(config)
    return load_checkpoint(output_dir / f"checkpoint-{config.max_train_steps}")


def largest_difference(one, other):
    differences = []
    for part in ("weights", "ema", "optimizer"):
        mine, theirs = getattr(one, part), getattr(other, part)
        assert mine.keys() == theirs.keys()
        differences += [float((value - theirs[name]).abs().max()) for name, value in mine.items()]
    return max(differences)


# --- what auto chooses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_auto_chooses_bf16_where_it_is_native_and_never_fp16(native, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(fast, "cpu_has_bfloat16", lambda: native)
    wanted = "bf16" if native else "no"
    assert choose_precision(GPU, SMALL).value == wanted
    assert choose_precision(CPU, LARGE).value == wanted
    assert choose_precision(CPU, SMALL).value == "no"


def test_auto_chooses_channels_last_and_compilation_where_they_pay_off():
    assert choose_channels_last("bf16", GPU, LARGE).value == "no"
    assert choose_channels_last("bf16", CPU, LARGE).value == "yes"
    assert choose_channels_last("bf16", CPU, SMALL).value == "no"
    assert choose_channels_last("no", GPU, LARGE).value == "no"
    assert choose_compile(CPU, 800_000).value == "no"


def test_only_a_cpu_is_asked_for_its_instructions():
    assert choose_precision(torch.device("mps"), LARGE).value == "no"


def test_auto_reports_its_choices_and_reasons_in_one_line_and_the_default_nothing(tmp_path, capsys):
    options = {"max_train_steps": 1, "dry_run": True, "output_dir": str(tmp_path / "run")}
    train(TrainConfig(**{**TINY_OPTIONS, **options}))
    assert "Chosen" not in capsys.readouterr().out
    autos = {"mixed_precision": "auto", "channels_last": "auto", "compile": "auto"}
    train(TrainConfig(**{**TINY_OPTIONS, **options, **autos}))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Chosen:")]
    for part in ("mixed_precision no, because", "channels_last no, because", "compile no, because"):
        assert part in line


def test_yes_and_no_of_yaml_are_words(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("dataset_name: digits\nmixed_precision: no\nchannels_last: yes\ncompile: no\n")
    config = parse_train_config(["--config", str(file)])
    assert (config.mixed_precision, config.channels_last, config.compile) == ("no", "yes", "no")
    file.write_text("dataset_name: digits\nmixed_precision: yes\n")
    with pytest.raises(ValueError, match="`mixed_precision` is 'yes', but must be one of"):
        parse_train_config(["--config", str(file)])


# --- the same run, whatever it chooses -------------------------------------------------------------------------------


def test_a_run_in_bf16_and_channels_last_resumes_bit_for_bit(tmp_path):
    """The fused AdamW assumes that moments have the memory format of their weights; files have one format only."""
    options = {"mixed_precision": "bf16", "channels_last": "yes"}
    whole = a_run(tmp_path / "whole", **options)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    resumed = a_run(tmp_path / "resumed", resume_from_checkpoint="latest", **options)
    assert largest_difference(whole, resumed) == 0
    assert all(weight.is_contiguous() for weight in whole.weights.values())


def test_the_memory_format_changes_rounding_alone(tmp_path):
    no_dropout = {"unet": {**TINY_OPTIONS["unet"], "dropout": 0.0}}
    first, last = (a_run(tmp_path / order, channels_last=order, **no_dropout) for order in ("no", "yes"))
    assert 0 < largest_difference(first, last) < 1e-4


@pytest.mark.slow
def test_a_compiled_run_saves_the_same_names_and_is_resumed_by_an_uncompiled_one(tmp_path, monkeypatch):
    """All of torch.compile but the generation of code, which takes a minute."""
    compiled = []

    def compile_without_code(module, **options):
        compiled.append(module)
        return torch_compile(module, backend="aot_eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_code)
    options = {"unet": {**TINY_OPTIONS["unet"], "dropout": 0.0}}
    eager = a_run(tmp_path / "eager", **options)
    assert not compiled
    both = a_run(tmp_path / "both", compile="yes", max_train_steps=2, lr_scheduler="constant", **options)
    assert len(compiled) == 1
    assert both.weights.keys() == eager.weights.keys()
    eager = a_run(tmp_path / "eager2", max_train_steps=2, lr_scheduler="constant", **options)
    assert largest_difference(eager, both) < 1e-4
    eager = a_run(tmp_path / "eager2", lr_scheduler="constant", resume_from_checkpoint="latest", **options)
    both = a_run(tmp_path / "both", lr_scheduler="constant", resume_from_checkpoint="latest", **options)
    assert largest_difference(eager, both) < 1e-4


# --- nothing waits ---------------------------------------------------------------------------------------------------


class Synchronizations(TorchDispatchMode):
    """Counts what would make the CPU wait for a GPU: a value that Python looks at, a size that depends on values."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_an_update_never_waits_for_the_device(tmp_path, monkeypatch):
    """Runs of 12 and of 18 updates log twice each, so more updates must not mean more waiting."""
    monkeypatch.setattr(ddpm_process, "_is_readable", lambda t: False)  # as on a GPU
    counts = {}
    for steps in (12, 18):
        options = {"max_train_steps": steps, "checkpointing_steps": 100, "gradient_accumulation_steps": 1}
        with Synchronizations() as waits:
            a_run(tmp_path / str(steps), **options)
        counts[steps] = waits.counts
    assert counts[12] == counts[18]
    assert counts[12].total() > 0  # the log itself does


@pytest.mark.slow
def test_accumulation_shares_gradients_once_per_update(two_processes):
    assert two_processes[1].count("shared 3 times") == 2


def test_a_build_for_absent_gpus_chooses_for_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: GPU)
    assert performance.expected_device() == CPU
