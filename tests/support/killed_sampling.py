"""Die by SIGKILL at every moment at which a file changes, then resume. For test_folder.

    python killed_sampling.py FOLDER FORMAT

Forked from one process that has imported everything, so that a start costs little.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.sampling.files import NpzFile, PngFiles
from ddpm_hf.sampling.folder import sample_to_folder
from ddpm_hf.sampling.generate import index_batches
from support.models import tiny_unet

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
NUM_IMAGES, BATCH_SIZE = 5, 2


def sample(pipe, folder, format, death=None):
    """Sample in a child that dies before its `death`-th change of a file; returns its number of images, or -9."""
    child = os.fork()
    if child == 0:
        moments = itertools.count(1)

        def die(event, arguments):
            is_change = event in FILE_EVENTS and (event != "open" or "w" in (arguments[1] or ""))
            if event == "open" and is_change:  # only `*.partial` is opened: final names come by renaming
                assert not str(arguments[0]).endswith((".png", ".npy", ".npz", ".json")), arguments
            if is_change and next(moments) == death:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        options = {"num_inference_steps": 2, "format": format, "show_progress": False}
        os._exit(sample_to_folder(pipe, folder, NUM_IMAGES, 0, BATCH_SIZE, **options))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finished(folder, format):
    """The images of complete batches, and the times at which PNGs of them were written."""
    files = PngFiles(folder) if format == "png" else NpzFile(folder)
    existing = files.existing()
    images = [i for batch in index_batches(NUM_IMAGES, BATCH_SIZE) if existing.issuperset(batch) for i in batch]
    return images, {i: (folder / f"{i:05d}.png").stat().st_mtime_ns for i in images if format == "png"}


def main() -> None:
    root, format = Path(sys.argv[1]), sys.argv[2]
    pipe = DDPMPipelineCustom(tiny_unet(channels=1), DDPMSchedulerCustom(timestep_spacing="linspace"))
    assert sample(pipe, root / "calm", format) == NUM_IMAGES
    expected = contents(root / "calm")
    for death in itertools.count(1):
        folder = root / str(death)
        status = sample(pipe, folder, format, death)
        if status >= 0:  # it survived all of its changes
            break
        assert status == -signal.SIGKILL
        images, times = finished(folder, format)
        assert sample(pipe, folder, format) == NUM_IMAGES - len(images), death
        assert contents(folder) == expected, death
        assert {i: finished(folder, format)[1][i] for i in times} == times, death
    print("deaths", death - 1)


if __name__ == "__main__":
    main()
