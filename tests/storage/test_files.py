"""Writing: whole files or none, and what is said where the disk is full."""

import errno

import pytest
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors import SafetensorError

from ddpm_hf.cli import main
from ddpm_hf.storage.files import full_disk_explained, write_atomically, write_text_atomically
from support.runs import run_here


def test_where_a_file_cannot_be_written_the_old_one_stays_and_no_other_is_left(file_limit, tmp_path):
    file = tmp_path / "metrics.json"
    write_text_atomically(file, "old")
    file_limit(1000)
    with pytest.raises(OSError, match=r"File too large: '.*metrics\.json'"):
        write_text_atomically(file, "x" * 100_000)
    with pytest.raises(ZeroDivisionError):
        write_atomically(file, lambda stream: stream.write(bytes(1 // 0)))
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert file.read_text() == "old"


def test_a_full_disk_names_the_place_the_room_and_the_remedy(tmp_path):
    place = tmp_path / "new" / "model"
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})"),
    ):
        with pytest.raises(OSError, match="No space left") as caught, full_disk_explained(place, 3 * 2**20, "Mend it."):
            raise error
        text = str(caught.value)
        assert text.startswith(f"'{place}' can't be written (")
        assert " are free on its disk, and 3.0 MiB are needed. Mend it." in text
        with pytest.raises(OSError, match="No space left") as again, full_disk_explained(tmp_path):
            raise caught.value  # which says it already
        assert again.value is caught.value


def test_other_errors_of_a_disk_stay_what_they_are(tmp_path):
    for error in (PermissionError(errno.EACCES, "Permission denied"), FileNotFoundError(errno.ENOENT, "No such file")):
        with pytest.raises(type(error)) as caught, full_disk_explained(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(OSError, match="can't be written: header too large"), full_disk_explained(tmp_path):
        raise SafetensorError("header too large")


@pytest.mark.parametrize("command", ["calibrate", "convert", "evaluate"])
def test_commands_end_in_a_line_where_the_disk_is_full_and_leave_no_temporary_file(
    command, file_limit, make_unet, tmp_path
):
    model, new = tmp_path / "model", tmp_path / "new"
    scheduler = DDPMScheduler(6, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=1, sample_size=8), scheduler).save_pretrained(model)
    digits = ["--dataset", "digits", "--num_images", "16", "--output_dir", str(new)]
    options = {
        "calibrate": digits,
        "convert": [str(new)],
        "evaluate": [*digits, "--metrics", "bpd", "--num_likelihood_images", "16"],
    }[command]
    file_limit(2000)  # less than the weights, or the terms of the likelihood
    done = run_here(main, [command, str(model), *options])
    file_limit(-1)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"error: '{new}' can't be written (")
    assert " free on its disk" in error
    assert "Free some space" in error
    assert "Traceback" not in done.stderr
    assert not [p for p in tmp_path.rglob("*") if ".partial" in p.name or "ddpm-hf-convert" in p.name]
    again = run_here(main, [command, str(model), *options])
    assert again.returncode == 0, again.stderr
