"""A folder of sampled images that any number of processes fill, and that a later run goes on with."""

from __future__ import annotations

import json
import math
import reprlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from .pictures import image_grid
from .pipeline import DDPMPipelineCustom
from .run_folder import check_writable, lock_output_dir
from .sample_files import PARTIAL, NpzFile, PngFiles, write_whole
from .sampling import describe_sampling, image_batches, sample_pixels

RECORD = "sampling.json"
GRID = "grid.png"
GRID_IMAGES = 256
PNG_CHANNELS = 4
BLOCK = 4096  # bytes that a small file takes


def sample_to_folder(
    pipeline: DDPMPipelineCustom,
    output_dir: Path,
    num_images: int,
    seed: int,
    batch_size: int,
    *,
    format: Literal["png", "npz"] = "png",
    class_labels: Sequence[int] | None = None,
    show_progress: bool = True,
    **call_options: Any,
) -> int:
    """Fill a folder with images 0 … N - 1, a grid of the first 256, and `sampling.json`: what they were made with.

    All processes must call it; each makes its share. What is there already stays, so that a run that was killed at any
    moment goes on, and one with a larger N adds to it: the images are those of a single run, bit for bit. (A last batch
    that N had cut short is made again, whole, since an image's last bits depend on its batch's size.)

    Args:
        output_dir: is made where it does not exist.
        num_images: N.
        seed: image i comes from seed + i.
        batch_size: B, images per network call and process.
        format: numbered PNGs, for 1 to 4 channels, or one `samples.npz`: see `NpzFile`.
        class_labels: used in turn.
        call_options: go to the pipeline's call.

    Returns:
        How many images were made, by all processes together.

    Raises:
        ValueError: before any network call, for any bad argument; where the disk has no room; for a folder that can't
            be written, in which another run is at work, or which holds other images.
        OSError: where writing fails. What was written is kept.
    """
    state, shape = PartialState(), _image_shape(pipeline)
    if format == "png" and shape[-1] > PNG_CHANNELS:
        raise ValueError(f"`format` is 'png', which can't hold {shape[-1]} channels: use --format npz.")
    record = describe_sampling(pipeline, seed, batch_size, class_labels, **call_options) | {"format": format}
    files = PngFiles(output_dir) if format == "png" else NpzFile(output_dir)
    present = files.present()
    batches = image_batches(num_images, batch_size)
    whole = {number for number, images in enumerate(batches) if present.issuperset(images)}
    missing = sum(len(images) for number, images in enumerate(batches) if number not in whole)
    check_writable(output_dir)
    _check_images(output_dir, record, present, num_images)
    _check_space(output_dir, missing, num_images if format == "npz" else 0, math.prod(shape))
    made = sample_pixels(
        pipeline, num_images, seed, batch_size,
        class_labels=class_labels, skip=whole, show_progress=show_progress, **call_options,
    )  # fmt: skip

    state.wait_for_everyone()  # from here on, files change
    with _locked(output_dir) if state.is_main_process else nullcontext():
        if state.is_main_process:
            for leftover in output_dir.rglob(f"*{PARTIAL}"):
                leftover.unlink()
            _write_record(output_dir, record)
        state.wait_for_everyone()
        for images, pixels in made:
            files.save(images, pixels)
        state.wait_for_everyone()
        if state.is_main_process:
            if isinstance(files, NpzFile):
                files.pack(num_images, batch_size, shape, class_labels)
            if shape[-1] <= PNG_CHANNELS:
                grid = image_grid(files.first(min(num_images, GRID_IMAGES)))
                write_whole(output_dir / GRID, lambda stream: grid.save(stream, "PNG"))
        state.wait_for_everyone()
    return missing


def _image_shape(pipeline: DDPMPipelineCustom) -> tuple[int, int, int]:
    """(H, W, C) of the images."""
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    return height, width, channels


def _check_images(output_dir: Path, record: dict[str, Any], present: set[int], num_images: int) -> None:
    """Raise a ValueError unless the images in the folder are the first ones of those asked for."""
    beyond = sorted(i for i in present if i >= num_images)
    if beyond:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {len(beyond)} images of a longer run (number {beyond[0]} …), but "
            f"`num_images` is {num_images}: ask for more, or choose another --output_dir."
        )
    if not present:
        return
    file = output_dir / RECORD
    try:
        earlier = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {len(present)} images, but no {RECORD} that says what made them "
            f"({error}): choose another --output_dir."
        ) from error
    asked = json.loads(json.dumps(record))
    changed = [key for key in earlier.keys() | asked.keys() if earlier.get(key) != asked.get(key)]
    if changed:
        differences = "; ".join(
            f"`{key}` was {reprlib.repr(earlier.get(key))} and is {reprlib.repr(asked.get(key))}"
            for key in sorted(changed)
        )
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {len(present)} images that were made otherwise: {differences}. "
            "Choose another --output_dir, or the same options."
        )


def _check_space(output_dir: Path, missing: int, packed: int, image_bytes: int) -> None:
    """Raise a ValueError unless the disk has room for the missing images, and for those of an `.npz` once more."""
    there = next(place for place in (output_dir, *output_dir.absolute().parents) if place.exists())
    free, needed = shutil.disk_usage(there).free, missing * max(BLOCK, image_bytes) + packed * image_bytes
    if missing and free < needed:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} is on a disk with {free / 2**20:,.0f} MiB free, but {missing} images "
            f"take {needed / 2**20:,.0f} MiB: free some, or choose another one."
        )


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    """Keep other runs out of the folder."""
    lock = lock_output_dir(output_dir)
    try:
        yield
    finally:
        lock.release()


def _write_record(output_dir: Path, record: dict[str, Any]) -> None:
    """One line per entry."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    write_whole(output_dir / RECORD, lambda stream: stream.write(f"{{\n{lines}\n}}\n".encode()))
