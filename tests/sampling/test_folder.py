"""Folders of samples: complete after any interruption, never mixed, the same by any number of processes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.cli import main
from ddpm_hf.sampling.folder import sample_to_folder
from ddpm_hf.sampling.generate import sample_pixels
from support.runs import ROOT, SUPPORT, run

ENV = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
TWO_PROCESSES = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SCRIPT = str(ROOT / "training" / "sample.py")


@pytest.fixture
def make_pipe(make_unet):
    def make(channels=1, dtype=torch.float32, **options):
        return DDPMPipelineCustom(
            make_unet(channels=channels, **options).to(dtype), DDPMSchedulerCustom(timestep_spacing="linspace")
        )

    return make


def fill(pipe, folder, num_images, batch_size=3, seed=0, **options):
    options = {"num_inference_steps": 3, "show_progress": False, **options}
    return sample_to_folder(pipe, folder, num_images, seed, batch_size, **options)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def count_calls(network):
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_both_formats_hold_the_pixels(channels, make_pipe, tmp_path):
    pipe = make_pipe(channels, num_class_embeds=4)
    options = {"num_inference_steps": 3, "class_labels": [0, 1, 3]}
    batches = [pixels for _, pixels in sample_pixels(pipe, 7, 0, 3, show_progress=False, **options)]
    expected = torch.cat(batches).permute(0, 2, 3, 1).numpy()
    assert fill(pipe, tmp_path / "npz", 7, format="npz", **options) == 7
    with np.load(tmp_path / "npz" / "samples.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], expected)
        assert arrays["arr_1"].tolist() == [0, 1, 3, 0, 1, 3, 0]
    assert not (tmp_path / "npz" / "shards").exists()
    assert fill(pipe, tmp_path / "npz", 7, format="npz", **options) == 0
    if channels == 5:
        with pytest.raises(ValueError, match="can't hold 5 channels: use --format npz"):
            fill(pipe, tmp_path / "png", 7, **options)
        return
    assert fill(pipe, tmp_path / "png", 7, **options) == 7
    images = [np.asarray(Image.open(tmp_path / "png" / f"0000{i}.png")) for i in range(7)]
    assert np.array_equal(np.stack(images).reshape(expected.shape), expected)
    assert (tmp_path / "png" / "grid.png").read_bytes() == (tmp_path / "npz" / "grid.png").read_bytes()


@pytest.mark.parametrize("format", ["png", "npz"])
def test_more_images_are_added_and_a_finished_folder_costs_no_network_call(format, make_pipe, tmp_path):
    """Image 6 was alone in a batch that N = 7 had cut short, and is made again among three, which changes its bits."""
    pipe = make_pipe(3, torch.bfloat16)
    options = {"num_inference_steps": 10, "format": format}
    fill(pipe, tmp_path / "at once", 11, **options)
    fill(pipe, tmp_path / "grown", 7, **options)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "grown").glob("0000[0-5].png")}
    calls = count_calls(pipe.unet)
    assert fill(pipe, tmp_path / "grown", 11, **options) == 5
    assert len(calls) == 2 * 10
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")
    assert fill(pipe, tmp_path / "grown", 11, **options) == 0
    assert len(calls) == 2 * 10
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")


@pytest.mark.parametrize("format", ["png", "npz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "`seed` was 0 and is 1"),
        ({"batch_size": 2}, "`batch_size` was 3 and is 2"),
        ({"num_inference_steps": 4}, "`num_inference_steps` was 3 and is 4; `timesteps` was"),
        ({"eta": 0.0}, "`eta` was None and is 0.0"),
        ({"format": "png", "seed": 1}, "`seed` was 0 and is 1"),
        ({"num_images": 2}, "holds 2 images of a longer run.*number 2"),
    ],
)
def test_images_of_other_options_are_not_mixed(change, message, format, make_pipe, tmp_path):
    pipe = make_pipe()
    fill(pipe, tmp_path, 4, format=format)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*another --output_dir"):
        fill(pipe, tmp_path, **{"num_images": 4, "format": format, **change})
    assert contents(tmp_path) == before


def test_images_of_other_weights_or_of_unknown_origin_are_not_mixed(make_pipe, tmp_path):
    pipe = make_pipe()
    fill(pipe, tmp_path, 2)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1e-6
    with pytest.raises(ValueError, match="`weights` was '.*' and is '"):
        fill(pipe, tmp_path, 2)
    (tmp_path / "sampling.json").write_text("{")
    with pytest.raises(ValueError, match="no sampling.json that records how they were made"):
        fill(pipe, tmp_path, 2)
    (tmp_path / "sampling.json").unlink()
    with pytest.raises(ValueError, match="holds 2 images, but no sampling.json"):
        fill(pipe, tmp_path, 2)


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "another array":
        np.savez(file, features=np.zeros(3))
    elif how == "other numbers":
        np.savez(file, np.zeros((4, 8, 8, 1), np.float32))
    elif how == "other shape":
        np.savez(file, np.zeros(4, np.uint8))
    elif how == "pickle":
        np.savez(file, np.array([{}], dtype=object))


@pytest.mark.parametrize("format", ["png", "npz"])
@pytest.mark.parametrize("how", ["truncated", "empty", "another array", "other numbers", "other shape", "pickle"])
def test_damaged_and_foreign_files_are_named_and_kept(how, format, make_pipe, tmp_path):
    pipe = make_pipe()
    fill(pipe, tmp_path, 4, format="npz")
    damage(tmp_path / "samples.npz", how)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"samples\.npz' is damaged, or was not written .*another --output_dir"):
        fill(pipe, tmp_path, 8, format=format)
    assert contents(tmp_path) == before


def test_pixels_corrupted_on_the_disk_are_rejected(make_pipe, tmp_path):
    """The file opens: only its checksum shows it."""
    pipe = make_pipe()
    fill(pipe, tmp_path, 4, format="npz")
    content = bytearray((tmp_path / "samples.npz").read_bytes())
    content[200] ^= 1  # behind the header of `arr_0`
    (tmp_path / "samples.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"samples\.npz' is damaged.*CRC"):
        fill(pipe, tmp_path, 8, format="npz")
    assert (tmp_path / "samples.npz").read_bytes() == content


def test_full_disks_and_files_in_the_way_are_refused_before_any_network_call(make_pipe, tmp_path):
    pipe = make_pipe()
    calls = count_calls(pipe.unet)
    with pytest.raises(ValueError, match=r"iB free, but 10000000000 images take 38,147.0 GiB"):
        fill(pipe, tmp_path / "out", 10**10, batch_size=10**7)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="can't be written"):
        fill(pipe, tmp_path / "file", 4)
    assert calls == []
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_fills_up_loses_only_what_was_not_yet_written(file_limit, make_pipe, tmp_path):
    pipe = make_pipe()
    fill(pipe, tmp_path / "roomy", 50, batch_size=25, format="npz")
    file_limit(3000)  # enough for a batch, but not for all of them
    with pytest.raises(OSError, match="can't be written into .*samples.npz.*, whose disk has .* free: free some space"):
        fill(pipe, tmp_path / "full", 50, batch_size=25, format="npz")
    file_limit(resource.RLIM_INFINITY)
    assert fill(pipe, tmp_path / "full", 50, batch_size=25, format="npz") == 0
    assert contents(tmp_path / "full") == contents(tmp_path / "roomy")


def test_the_record_holds_what_determines_the_images(make_pipe, tmp_path):
    fill(make_pipe(), tmp_path, 2, seed=5, eta=0.5)
    record = json.loads((tmp_path / "sampling.json").read_text())
    stated = {"seed": 5, "batch_size": 3, "num_train_timesteps": 1000, "num_inference_steps": 3, "eta": 0.5}
    assert record.items() >= {**stated, "variance_type": "fixed_small", "dtype": "float32", "device": "cpu"}.items()
    assert record["timesteps"] == [999, 500, 0]
    assert record["torch"] == torch.__version__


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_inference_steps", "2000"], "num_inference_steps.*2000"),
        (["--device", "abacus"], "device.*abacus"),
        (["--eta", "2"], "eta.*2"),
        (["--seed", str(2**64)], "seed.*2\\^63"),
        (["--class_label", "1"], "unconditional"),
        (["--revision", "v1"], "revision.*folder"),
    ],
)
def test_bad_sample_options_end_in_one_line_and_write_nothing(options, message, make_unet, tmp_path):
    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["sample", str(tmp_path / "model"), "--output_dir", str(out), *options])
    assert not out.exists() or not any(out.iterdir())


def test_images_of_a_longer_run_are_not_mixed_in(make_unet, tmp_path):
    DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom()).save_pretrained(tmp_path / "model")
    command = ["sample", str(tmp_path / "model"), "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out")]
    main([*command, "--num_images", "3"])
    main([*command, "--num_images", "3"])  # the same again is fine
    with pytest.raises(SystemExit, match=r"holds 1 images of a longer run \(from number 2\)"):
        main([*command, "--num_images", "2"])


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(make_pipe, tmp_path):
    make_pipe(channels=3).save_pretrained(tmp_path / "model")
    return [SCRIPT, str(tmp_path / "model"), "--steps", "3", "--batch_size", "2", "--output_dir"]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "before"), [("png", 0), ("npz", 5)])
def test_two_processes_make_the_bytes_of_one(format, before, command, tmp_path):
    """From nothing, and from what one process has left."""
    options = ["--num_images", "9", "--format", format]
    one, two = tmp_path / "one", tmp_path / "two"
    main(["sample", *command[1:], str(one), *options])
    if before:
        main(["sample", *command[1:], str(two), *options, "--num_images", str(before)])
    done = run([*TWO_PROCESSES, *command, str(two), *options], env=ENV)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("new, ") == 1
    share = {"png": 3, "npz": 2}[format]  # of the batches that are missing
    assert f"{3 * share}/{3 * share}" in done.stderr
    assert contents(two) == contents(one)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["png", "npz"])
def test_a_run_killed_at_any_moment_resumes_to_the_same_bytes(format, tmp_path):
    """By SIGKILL before every single change of a file."""
    script = str(SUPPORT / "killed_sampling.py")
    done = run([sys.executable, script, str(tmp_path), format], env=ENV)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"deaths (\d+)", done.stdout)[1]) > 15


def test_ctrl_c_ends_without_a_traceback_and_the_same_command_resumes(command, tmp_path):
    out = tmp_path / "out"
    slow = [sys.executable, *command, str(out), "--num_images", "100000"]  # more than it can make before the signal
    process = subprocess.Popen(slow, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=ENV)
    while not (out / "00001.png").exists():
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0].decode()
    with pytest.raises(SystemExit, match="another run is writing"):
        main(["sample", *command[1:], str(out), "--num_images", "100000"])
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert b"Interrupted by Ctrl-C. What was saved before is unharmed. Run it again with:\n  ddpm-hf sample" in output
    assert b"Traceback" not in output
    made = max(int(p.stem) for p in out.glob("[0-9]*.png")) + 1
    main(["sample", *command[1:], str(out), "--num_images", str(made)])
    assert {p.name for p in out.glob("[0-9]*.png")} == {f"{i:05d}.png" for i in range(made)}
    shutil.rmtree(out)
