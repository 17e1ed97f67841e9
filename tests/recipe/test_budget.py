"""Real runs with a time budget. What is asserted does not depend on the speed of the machine."""

import hashlib
import html
import json
import re
import shutil
import signal
import sys
import time

import pytest
import yaml

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.config.parsing import parse_given, parse_train_config
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.recipe.command import main, start_of_command
from ddpm_hf.storage.checkpoint import checkpoint_steps, load_checkpoint, read_progress
from support.runs import ROOT, TINY_UNET, run, run_here, start

DDPM_HF = (sys.executable, "-m", "ddpm_hf", "train")
# Long enough for hundreds of updates of a tiny network, even on a machine that does much else.
SMALL = ["--unet", json.dumps({**TINY_UNET, "dropout": 0.0}), "--report_to", "none", "--eval_batch_size", "4"]
SMALL += ["--ddpm_num_inference_steps", "3", "--resolution", "16", "--eval_steps", "1000000", "--eval_images", "32"]


def entries(out):
    return [json.loads(line) for line in (out / "logs" / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def timed_run(tmp_path_factory):
    """`ddpm-hf train digits` for 60 seconds: the folder, and what was printed."""
    out = tmp_path_factory.mktemp("timed") / "run"
    done = run([*DDPM_HF, "digits", "--time_budget", "60s", *SMALL, "--output_dir", str(out)])
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.mark.slow
def test_a_run_ends_with_its_learning_rate_decayed_and_everything_exported(timed_run):
    out, printed = timed_run
    assert "Plan for scikit-learn digits in 60s, until" in printed
    assert "never mirrored" in printed
    page = html.unescape((out / "report.html").read_text("utf-8"))
    reasons = re.findall(r"(?m)^  (images|training|held out|expect|note) +(.*)$", printed)
    assert len(reasons) >= 4
    for name, text in reasons:
        assert f"{name.capitalize()}</th><td>{text}</td>" in page
    rates = [e["lr"] for e in entries(out) if "lr" in e]
    assert max(rates) > 1e-3
    assert rates[-1] < 1e-12
    (step,) = checkpoint_steps(out)
    assert entries(out)[-1]["step"] == step
    assert f"{step:,}" in (out / "README.md").read_text()
    saved = read_progress(out / f"checkpoint-{step}")
    assert saved["clock"]["fraction"] == 1
    assert saved["clock"]["elapsed"] > 0
    assert saved["clock"]["budget"] == 60
    DDPMPipelineCustom.from_pretrained(out)
    for name in ("samples_and_real.png", "loss.png"):
        assert (out / name).is_file()


@pytest.mark.slow
def test_its_recipe_is_the_whole_configuration_and_plans_nothing_anew(timed_run):
    out, _ = timed_run
    config = TrainConfig(**yaml.safe_load((out / "recipe.yaml").read_text("utf-8")))
    saved = read_progress(out / f"checkpoint-{checkpoint_steps(out)[-1]}")["config"]
    assert json.loads(json.dumps(config.public())) == saved
    assert TrainConfig(**parse_given(["--config", str(out / "recipe.yaml")])).public() == config.public()
    again = run([*DDPM_HF, "--config", str(out / "recipe.yaml"), "--output_dir", str(out / "again"), "--dry_run"])
    assert again.returncode == 0, again.stderr
    assert "Plan for" not in again.stdout
    assert "nothing is planned anew" in again.stdout
    assert not (out / "again").exists()


@pytest.mark.slow
def test_a_killed_run_resumes_in_the_time_that_is_left_and_a_finished_one_takes_more(timed_run, tmp_path):
    """With a day to train in, a run that is stopped has nearly a day left."""
    out = tmp_path / "run"
    command = [*DDPM_HF, "digits", "--time_budget", "1d", *SMALL, "--output_dir", str(out)]
    command += ["--train_batch_size", "4", "--lr_warmup_steps", "0", "--calibration_images", "0"]
    process = start(command)
    log = out / "logs" / "train.jsonl"
    while not (log.is_file() and log.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.stdout.read().decode()
    (step,) = checkpoint_steps(out)
    before = read_progress(out / f"checkpoint-{step}")["clock"]
    assert before["budget"] == 86400
    assert 0 < before["fraction"] < 0.5

    # What the checkpoint says counts: with all but 20 s of the time gone, the rest of the decay takes no longer.
    file = out / f"checkpoint-{step}" / "training_state" / "progress.json"
    progress = json.loads(file.read_text())
    progress["clock"] |= {"elapsed": 86400 - 20.0, "fraction": 0.9}
    replaced = json.dumps(progress, indent=2)
    file.write_text(replaced)
    manifest = out / f"checkpoint-{step}" / "manifest.json"
    hashes = json.loads(manifest.read_text())
    hashes["training_state/progress.json"] = hashlib.sha256(replaced.encode()).hexdigest()
    manifest.write_text(json.dumps(hashes))
    done = run([*command, "--resume_from_checkpoint", "latest"])
    assert done.returncode == 0, done.stderr
    assert "Plan for" not in done.stdout
    assert re.search(r"Of the time, 0:00:\d\d .* are left", done.stdout)
    last = checkpoint_steps(out)[-1]
    after = read_progress(out / f"checkpoint-{last}")["clock"]
    assert after["fraction"] == 1
    assert after["elapsed"] > 86400 - 20
    rates = {e["step"]: e["lr"] for e in entries(out) if "lr" in e}
    assert all(rate < 0.05 * max(rates.values()) for s, rate in rates.items() if s > step + 10)
    assert rates[last] < 1e-12

    more, _ = timed_run
    shutil.copytree(more, tmp_path / "more")
    first = checkpoint_steps(more)[-1]
    done = run([*DDPM_HF, "--time_budget", "+20s", "--output_dir", str(tmp_path / "more")])
    assert done.returncode == 0, done.stderr
    rates = {e["step"]: e["lr"] for e in entries(tmp_path / "more") if "lr" in e}
    last = checkpoint_steps(tmp_path / "more")[-1]
    assert last > first
    assert rates[last] < 1e-12
    assert read_progress(tmp_path / "more" / f"checkpoint-{last}")["clock"]["first_update"] == first
    folders = more / f"checkpoint-{first}", tmp_path / "more" / f"checkpoint-{last}"
    old, new = (load_checkpoint(folder).weights for folder in folders)
    assert any(not old[name].equal(new[name]) for name in old)


def test_a_run_that_is_continued_is_not_given_the_digits_where_no_images_are_named():
    given = parse_given(["--time_budget", "+1h", "--output_dir", "of-photos"])
    assert given == {"time_budget": "+1h", "output_dir": "of-photos"}
    assert parse_given(["digits", "--time_budget", "1h"])["dataset_name"] == "digits"
    assert parse_train_config(["--time_budget", "1h"]).dataset_name == "digits"


def test_what_a_shell_did_before_it_became_the_command_is_not_counted():
    """As in `sh -c "pip install …; ddpm-hf train …"`, which executes its last command in its own process."""
    assert start_of_command(created=1000.0, now=1000.9, work=0.2) == 1000.0
    assert start_of_command(created=1000.0, now=1600.0, work=0.2) == 1598.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--time_budget", "soon"], "`time_budget` is 'soon'"),
        (["digits", "--time_budget", "1s"], "time_budget.*1s.*Pass --time_budget"),
        (["digits", "--time_budget", "+1h", "--output_dir", "nowhere"], r"\+1h.*'nowhere' has no checkpoint"),
        (["digits", "--dataset_name", "x", "--time_budget", "1h"], "digits.*dataset_name.*leave one"),
        (["README.md", "--time_budget", "1h"], "README.md"),
    ],
)
def test_bad_plans_are_refused_in_a_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    done = run_here(main, ["--output_dir", str(tmp_path / "run"), *arguments])
    assert done.returncode == 1
    assert not (tmp_path / "run").exists()
    assert re.search(message, done.stderr), done.stderr
