"""What differs on Windows, pretended: folders can't be opened, files that are open for reading can't be synced."""

import errno
import fcntl
import os
import shutil
import sys

import pytest

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.storage.checkpoint import TrainingState, checkpoint_steps, load_checkpoint, save_checkpoint


@pytest.fixture
def synced(monkeypatch):
    """The names of the files that were flushed to the disk."""
    open_here, sync_here, names = os.open, os.fsync, []

    def open_there(path, *arguments, **options):
        if os.path.isdir(path):  # noqa: PTH112
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_here(path, *arguments, **options)

    def sync_there(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115, PTH119
        sync_here(descriptor)

    monkeypatch.setattr(os, "open", open_there)
    monkeypatch.setattr(os, "fsync", sync_there)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # which open folders
    return names


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_checkpoint_is_written_synced_and_read(synced, make_unet, tmp_path):
    pipeline = DDPMPipelineCustom(make_unet(), DDPMSchedulerCustom())
    for step in (1, 2):
        counts = {"step": step, "images_seen": step, "seconds": 1.0, "max_steps": 2, "num_images": 9}
        progress = counts | {"label_names": None, "num_processes": 1, "unlogged": [], "grad_scaler": None}
        progress["config"] = {"train_batch_size": 1, "gradient_accumulation_steps": 1}
        state = TrainingState(progress, dict(pipeline.unet.state_dict()), {})
        folder = save_checkpoint(tmp_path, pipeline, state, total_limit=1)
    assert checkpoint_steps(tmp_path) == [2]
    assert load_checkpoint(folder).step == 2
    assert {path.name for path in folder.rglob("*") if path.is_file()} <= set(synced)
