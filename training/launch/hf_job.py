# /// script
# requires-python = ">=3.11"
# dependencies = ["ddpm-hf[train,tensorboard]"]
#
# [tool.uv.sources]
# ddpm-hf = { index = "wheels" }
#
# [[tool.uv.index]]
# name = "wheels"
# url = "/wheels"
# format = "flat"
# explicit = true
# ///
"""Train on Hugging Face Jobs, on all GPUs of the machine, with the options of `ddpm-hf train`:

    uv build --wheel --out-dir dist
    hf buckets create me/my-ddpm
    hf jobs uv run --flavor a100x8 --timeout 24h --attempts 3 --secrets HF_TOKEN \
        -v ./dist:/wheels -v hf://buckets/me/my-ddpm:/output \
        training/launch/hf_job.py --config cifar10 --train_batch_size 16 --output_dir /output/cifar10

The package is the wheel of this clone, which the first volume brings. The run is written to the machine's own disk, as
a mounted bucket takes whole files only, without locks; every minute, and at the end, what is new is copied to
`--output_dir`. An attempt begins with what the one before has copied there, and resumes from its newest checkpoint.
"""

import argparse
import shutil
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

COPY_EVERY = 60  # seconds
LAST = "manifest.json"  # of a checkpoint: with it, the checkpoint is complete


class Mirror:
    """Keeps a folder the same as another one, on a file system that knows nothing but whole files."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.copied: dict[Path, tuple[int, int]] = {}  # when it was modified, and its size

    def restore(self) -> None:
        """Fill the source with what the target has."""
        if self.target.is_dir():
            shutil.copytree(self.target, self.source, dirs_exist_ok=True)
            self.copied = self._files()

    def update(self) -> None:
        """Copy what is new, and remove from the target what was removed from the source.

        Raises:
            OSError: where the target can't be written.
        """
        files = self._files()
        for name in sorted(files, key=lambda name: name.name == LAST):
            if self.copied.get(name) != files[name] and (self.source / name).exists():  # old checkpoints are removed
                (self.target / name).parent.mkdir(parents=True, exist_ok=True)
                with (self.source / name).open("rb") as source, (self.target / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
                self.copied[name] = files[name]
        for name in sorted(self.copied.keys() - files.keys(), key=lambda name: name.name != LAST):
            (self.target / name).unlink(missing_ok=True)
            del self.copied[name]
            with suppress(OSError):  # it is not empty, or a bucket, which has no folders
                (self.target / name).parent.rmdir()
                (self.target / name).parent.parent.rmdir()

    def _files(self) -> dict[Path, tuple[int, int]]:
        """The files of the source that are complete, by their names in it."""
        found = {}
        for file in self.source.rglob("*"):
            name = file.relative_to(self.source)
            is_complete = file.name != ".lock" and not any(part.endswith(".partial") for part in name.parts)
            with suppress(FileNotFoundError):  # removed since
                if is_complete and file.is_file():
                    found[name] = (file.stat().st_mtime_ns, file.stat().st_size)
        return found


def main() -> None:
    """Restore, train, and copy meanwhile."""
    from ddpm_hf.cli import main as ddpm_hf

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, required=True)
    ours, options = parser.parse_known_args()
    work = Path(tempfile.mkdtemp()) / ours.output_dir.name  # the card takes its title from the name
    mirror = Mirror(work, ours.output_dir)
    mirror.restore()
    is_over = threading.Event()

    def copy() -> None:
        while not is_over.wait(COPY_EVERY):
            try:
                mirror.update()
            except OSError as error:  # perhaps it passes; the last copy raises it
                print(f"{ours.output_dir} can't be written now: {error}", file=sys.stderr)

    copying = threading.Thread(target=copy)
    copying.start()
    try:
        ddpm_hf(["train", "--resume_from_checkpoint", "latest", *options, "--output_dir", str(work)])
    finally:
        is_over.set()
        copying.join()
        mirror.update()
        print(f"The run is in {ours.output_dir}.")


if __name__ == "__main__":
    main()
