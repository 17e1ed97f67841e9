"""The command line: what it answers at once, and processes that launchers start."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import ddpm_hf
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.cli import main
from ddpm_hf.config.parsing import PRESETS, parse_train_command
from ddpm_hf.storage.checkpoint import checkpoint_steps, load_checkpoint
from support.models import tiny_unet
from support.runs import ROOT, TINY, run

COMMANDS = (
    "train", "sample", "restore", "edit", "interpolate", "calibrate", "evaluate", "paper", "push", "convert", "doctor",
    "export", "demo", "cache", "env", "compress", "decompress",
)  # fmt: skip
DDPM_HF = (sys.executable, "-m", "ddpm_hf")
# The environment of somebody who has never heard of ours: no launcher, no choice of a device, no `accelerate config`.
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_"))}


def test_help_and_mistakes_answer_without_the_imports_that_take_seconds():
    lines = [["--help"], ["--version"], *([c, "--help"] for c in COMMANDS), *([c, "--nonsense"] for c in COMMANDS)]
    lines += [["train", "--learning_rate", "0"], ["sample", "model", "--eta", "2"], ["train", "--num_machines", "2"]]
    lines += [["restore", "model", "photo.png"], ["edit", "model", "photo.png", "--strength", "2"]]
    script = (
        "import sys\nfrom ddpm_hf.cli import main\n"
        f"for line in {lines}:\n"
        "    try:\n        main(line)\n"
        "    except SystemExit as end:\n        print(line, end.code)\n"
        "heavy = ('accelerate', 'datasets', 'diffusers', 'huggingface_hub', 'numpy', 'torch', 'transformers')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ends = [f"{line} {0 if line[-1] in ('--help', '--version') else 2}" for line in lines[:-5]]
    answers = done.stdout.splitlines()
    assert [a for a in answers if a.startswith("[") and a[-1] in "02"] == ends
    assert sum("error: " in a for a in answers) == 5
    assert answers[-1] == "[]"
    assert f"ddpm-hf {ddpm_hf.__version__}" in answers


def test_help_lists_the_commands_and_the_presets_with_a_phrase_each(capsys):
    for line in (["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(line)
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command}" in text
    for preset in PRESETS.glob("*.yaml"):
        phrase = preset.read_text("utf-8").splitlines()[0].removeprefix("# ")
        assert len(phrase) > 20
        assert f"\n  {preset.stem} " in text
        assert phrase in text
    assert "--num_processes" in text


def test_flags_of_the_launcher_are_told_from_those_of_the_run():
    flags = ["--unet", '{"layers_per_block": 1}', "--num_processes", "4", "--report_to", "none", "--machine_rank=1"]
    flags += [
        "--num_machines",
        "2",
        "--main_process_ip",
        "10.0.0.1",
        "--main_process_port",
        "1",
        "--cache_limit_gb",
        "3",
    ]
    options, others = parse_train_command(flags)
    assert (options.num_processes, options.num_machines, options.machine_rank) == (4, 2, 1)
    assert others == ["--unet", '{"layers_per_block": 1}', "--report_to", "none", "--cache_limit_gb", "3"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes", "0"], "num_processes.*0.*at least 1"),
        (["--num_machines", "2", "--num_processes", "2"], "--machine_rank, --main_process_ip, --main_process_port"),
        (["--machine_rank", "1"], "machine_rank.*1.*num_machines"),
        (["--accelerate_config", "nowhere.yaml"], "nowhere.yaml.*accelerate config --config_file nowhere.yaml"),
        (["--num_processes", "2", "--train_batch_size", "0"], "train_batch_size.*0"),
    ],
)
def test_bad_options_of_the_launcher_are_refused(flags, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["train", *flags])
    several = ["--num_machines", "2", "--machine_rank", "0", "--main_process_ip", "x", "--main_process_port", "1"]
    with pytest.raises(SystemExit, match="num_processes.*3.*multiple.*2"):
        main(["train", *several, "--num_processes", "3"])


def test_a_launched_process_starts_no_others(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit, match="--num_processes configures a launcher"):
        main(["train", "--num_processes", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["flags", "config"])
def test_processes_that_the_command_starts_train_together_and_end_together(launcher, tmp_path):
    """Two on a CPU by a flag, one by a file of `accelerate config`: SIGTERM reaches them, and leaves a checkpoint."""
    file = tmp_path / "accelerate.yaml"
    file.write_text(yaml.safe_dump({
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "no", "num_machines": 1,
        "num_processes": 1, "use_cpu": True,
    }))  # fmt: skip
    count, flags = (2, ["--num_processes", "2"]) if launcher == "flags" else (1, ["--accelerate_config", str(file)])
    out = tmp_path / "run"
    command = [*DDPM_HF, "train", *TINY, *flags, "--output_dir", str(out)]
    if count == 2:
        refused = run([*command, "--resolution", "13"], env=PLAIN)
        assert refused.returncode == 1
        assert "error: `resolution` is 13" in refused.stderr
        assert "Traceback" not in refused.stderr

    process = subprocess.Popen(
        [*command, "--max_train_steps", "100000", "--save_images_steps", "0"],
        cwd=ROOT, env=PLAIN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    log = out / "logs" / "train.jsonl"
    while not (log.is_file() and log.stat().st_size) and process.poll() is None:  # until updates are done
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"on {count} × cpu" in output
    assert "Traceback" not in output
    (last,) = checkpoint_steps(out)[-1:]
    assert f"Stopped after {last} updates" in output
    assert load_checkpoint(out / f"checkpoint-{last}").progress["images_seen"] == last * 4 * 2 * count


@pytest.mark.slow
def test_the_module_samples_under_a_launcher(tmp_path):
    DDPMPipelineCustom(tiny_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    options = ["sample", str(tmp_path / "model"), "--num_images", "3", "--steps", "2", "--batch_size", "1"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = run(
        [*launcher, "--main_process_port", "0", "-m", "ddpm_hf", *options, "--output_dir", str(tmp_path / "two")],
        env={**PLAIN, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": 3 new, 0 from before.") == 1
    main([*options, "--output_dir", str(tmp_path / "one")])
    for i in range(3):
        one, two = (np.asarray(Image.open(tmp_path / name / f"{i:05d}.png")) for name in ("one", "two"))
        np.testing.assert_array_equal(one, two)
