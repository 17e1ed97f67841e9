"""Die by SIGKILL at every moment at which a file changes, then go on. Run by test_sample_folder.

    python killed_sampling.py FOLDER FORMAT

Forked from one process that has imported everything, so that a start costs little.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from conftest import tiny_unet

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.sample_folder import sample_to_folder

FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
NUM_IMAGES, BATCH_SIZE = 5, 2


def sample(pipe, folder, format, death=None):
    """In a process of its own, which dies before the `death`-th change of a file; returns its exit code."""
    child = os.fork()
    if child == 0:
        moments = itertools.count(1)

        def die(event, arguments):
            is_change = event in FILE_EVENTS and (event != "open" or "w" in (arguments[1] or ""))
            if is_change and next(moments) == death:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        options = {"num_inference_steps": 2, "format": format, "show_progress": False}
        sample_to_folder(pipe, folder, NUM_IMAGES, 0, BATCH_SIZE, **options)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def finished(folder):
    """When each image of a whole batch was written, and each shard."""
    whole = [range(i, min(i + BATCH_SIZE, NUM_IMAGES)) for i in range(0, NUM_IMAGES, BATCH_SIZE)]
    batches = [[folder / f"{i:05d}.png" for i in batch] for batch in whole]
    files = [file for batch in batches if all(file.exists() for file in batch) for file in batch]
    return {file: file.stat().st_mtime_ns for file in files}


def main() -> None:
    root, format = Path(sys.argv[1]), sys.argv[2]
    pipe = DDPMPipelineCustom(tiny_unet(channels=1), DDPMSchedulerCustom(timestep_spacing="linspace"))
    assert sample(pipe, root / "calm", format) == 0
    expected = contents(root / "calm")
    for death in itertools.count(1):
        folder = root / str(death)
        status = sample(pipe, folder, format, death)
        written = finished(folder)
        assert sample(pipe, folder, format) == 0
        assert contents(folder) == expected, death
        assert {file: file.stat().st_mtime_ns for file in written} == written, death
        if status == 0:
            break
        assert status == -signal.SIGKILL
    print("deaths", death - 1)


if __name__ == "__main__":
    main()
