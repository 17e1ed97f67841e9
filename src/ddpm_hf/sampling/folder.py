"""A folder of sampled images that any number of processes fill. An interrupted run resumes."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState

from ..data.pictures import image_grid
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..storage.files import (
    check_free_space,
    check_writable,
    free_bytes,
    lock_output_dir,
    read_json,
    write_atomically,
    write_text_atomically,
)
from .files import NpzFile, PngFiles, image_files
from .generate import describe_sampling, index_batches, sample_pixels

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

    All processes must call it; each makes its share. Existing images are kept: a run that was killed at any moment
    resumes, and one with a larger N adds to them. The result is that of a single run, bit for bit. (A last batch that N
    had cut short is sampled again in full, since an image's last bits depend on the size of its batch.)

    Args:
        output_dir: created if missing.
        num_images: N.
        seed: image i comes from seed + i.
        batch_size: B, images per network call and process.
        format: numbered PNGs, for 1 to 4 channels, or one `samples.npz`: see `NpzFile`.
        class_labels: used in turn.
        call_options: go to the pipeline's call.

    Returns:
        How many images were made, by all processes together.

    Raises:
        ValueError: before any network call, for a bad argument, a full disk, or a folder that can't be written, that
            another run is writing into, or that holds images of another origin.
        OSError: if writing fails. Images written before are kept.
    """
    state, shape = PartialState(), (*image_size(pipeline.unet), pipeline.unet.config.in_channels)
    if format == "png" and shape[-1] > PNG_CHANNELS:
        raise ValueError(f"`format` is 'png', which can't hold {shape[-1]} channels: use --format npz.")
    check_writable(output_dir)
    record = describe_sampling(pipeline, seed, batch_size, class_labels, **call_options)
    _check_origin(output_dir, record)
    files = image_files(output_dir, format)
    existing = files.existing()
    _check_number(output_dir, existing, num_images)
    batches = index_batches(num_images, batch_size)
    complete = {number for number, images in enumerate(batches) if existing.issuperset(images)}
    missing = num_images - sum(len(batches[number]) for number in complete)
    if missing:
        image_bytes = math.prod(shape)
        packed = num_images * image_bytes if format == "npz" else 0  # the batches stay until the file of all is written
        check_free_space(output_dir, missing * max(BLOCK, image_bytes) + packed, f"{missing} images")
    made = sample_pixels(
        pipeline, num_images, seed, batch_size,
        class_labels=class_labels, skip=complete, show_progress=show_progress, **call_options,
    )  # fmt: skip

    state.wait_for_everyone()  # until all processes have listed the files, which change from here on
    with _writing(output_dir, record, state):
        for images, pixels in made:
            files.save(images, pixels)
        state.wait_for_everyone()
        if state.is_main_process:
            if isinstance(files, NpzFile):
                files.pack(num_images, batch_size, shape, class_labels)
            if shape[-1] <= PNG_CHANNELS:
                grid = image_grid(files.first(min(num_images, GRID_IMAGES)))
                write_atomically(output_dir / GRID, partial(grid.save, format="PNG"))
    return missing


def _check_origin(output_dir: Path, record: dict[str, Any]) -> None:
    """Raise a ValueError if the folder has images, in either format, that were made with other options."""
    count = len(PngFiles(output_dir).existing() | NpzFile(output_dir).existing())
    if not count:
        return
    try:
        earlier = read_json(output_dir / RECORD)
        if not isinstance(earlier, dict):
            raise ValueError("it is no mapping of options")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {count} images, but no {RECORD} that records how they "
            f"were made ({error}): choose another --output_dir."
        ) from error
    changes = changed_options(earlier, record)
    if changes:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {count} images made with other options: {'; '.join(changes)}. "
            "Use the same options, or choose another --output_dir."
        )


def changed_options(earlier: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What differs between how an image was made, as JSON has it, and how it is to be made now."""
    now = json.loads(json.dumps(record))
    return [
        f"`{key}` was {reprlib.repr(earlier.get(key))} and is {reprlib.repr(now.get(key))}"
        for key in now | earlier
        if earlier.get(key) != now.get(key)
    ]


def _check_number(output_dir: Path, existing: set[int], num_images: int) -> None:
    """Raise a ValueError for images beyond the number requested: they would pass for a part of the result."""
    beyond = [i for i in existing if i >= num_images]
    if beyond:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds {len(beyond)} images of a longer run (from number "
            f"{min(beyond)}), but `num_images` is {num_images}: raise it, or choose another --output_dir."
        )


@contextmanager
def _writing(output_dir: Path, record: dict[str, Any], state: PartialState) -> Iterator[None]:
    """Lock the folder and record there how its images are made; unlock it when all processes are done."""
    try:
        with lock_output_dir(output_dir, state.is_main_process):
            if state.is_main_process:
                lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
                write_text_atomically(output_dir / RECORD, f"{{\n{lines}\n}}\n")
            state.wait_for_everyone()
            yield
            state.wait_for_everyone()
    except OSError as error:
        raise OSError(
            f"images can't be written into {str(output_dir)!r} ({error}), whose disk has {free_bytes(output_dir):,} "
            "bytes free: free some space. The same command then resumes."
        ) from error
