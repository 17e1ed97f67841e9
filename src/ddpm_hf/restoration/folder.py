"""A folder of restored or edited photographs. An interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.restoration import EditConfig, PhotoOptions, RestoreConfig
from ..data.pixels import to_uint8
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..sampling.batch_size import fitting_batch_size, images_in_memory
from ..sampling.generate import describe_sampling, parse_labels
from ..storage.files import check_writable, lock_output_dir
from .edit import edit
from .operators import Blur, Inpaint
from .photos import Photo, check_same, gray_photo, photo_channels, read_kernel, read_mask, read_photo, save_photo
from .restore import restore
from .tasks import MOST_TILES, Task, coloring, common_operator, deblurring, editing, enlarging, inpainting
from .tiles import tile_corners

DEBLUR_NOISE = 0.005  # rounding to 8 bits alone is noise of 0.001, and the inverse of a blur multiplies it
BACKWARD_MEMORY = 8  # images that a call takes in the memory that one takes whose gradient is wanted
WIDEST_STD = 0.5  # of values in [0, 1], and white in a picture of standard deviations


@dataclass(frozen=True)
class Summary:
    """What a command did.

    Args:
        made: how many images are new.
        existing: how many are from before.
        failures: why photographs were left out.
    """

    made: int
    existing: int
    failures: dict[Path, str]


@dataclass(frozen=True)
class _Work:
    """A photograph, what to do with it, and hashes of the files that it depends on."""

    photo: Photo
    task: Task
    hashes: dict[str, str]


Reader = Callable[[Path], _Work]
Maker = Callable[[Sequence[Task], list[torch.Generator]], Tensor]


def restore_photos(
    pipeline: DDPMPipelineCustom, photos: Sequence[Path], config: RestoreConfig, show_progress: bool = True
) -> Summary:
    """Restore photographs into `config.output_dir`, each `<its name>.png`.

    Photographs of one size are restored together. Existing images of the same model, photograph and settings are kept.
    A photograph that can't be read, or that does not fit its mask or the model, is left out, and the rest done.

    Raises:
        ValueError: before the first network call, if none can be restored; if two photographs have one name; for a
            folder that holds images of that name of another origin, or that can't be written.
    """
    channels, size = photo_channels(pipeline.unet.config.in_channels), image_size(pipeline.unet)
    wanted, noise_std = config.wanted, config.noise_std
    if noise_std is None:
        noise_std = DEBLUR_NOISE if wanted == "deblur" else 0.0
    kernel = None if config.deblur is None else _kernel(config.deblur)
    if wanted == "colorize" and channels != 3:
        raise ValueError("--colorize needs a model of color images, but this one makes gray ones.")
    if config.mask is not None and not Path(config.mask).exists():
        raise ValueError(f"`mask` is {config.mask!r}, but there is no such file or folder.")
    needs_gradient = config.method in ("mmps", "dps", "pigdm")
    limit = images_in_memory(pipeline.unet) // BACKWARD_MEMORY if needs_gradient else MOST_TILES

    def read(file: Path) -> _Work:
        photo = gray_photo(file) if wanted == "colorize" else read_photo(file, channels)
        hashes = {"photo": _hash(file)}
        if config.mask is not None:
            mask = _mask_of(file, Path(config.mask))
            hashes["mask"] = _hash(mask)
            task = inpainting(photo, read_mask(mask), size, config.tiles, min(limit, MOST_TILES))
        elif config.upscale is not None:
            task = enlarging(photo, config.upscale, size)
        elif kernel is not None:
            task = deblurring(photo, kernel, size)
        else:
            task = coloring(photo, size, config.tiles)
        tiles = _number_of_tiles(task, size)
        if needs_gradient and tiles > limit:
            raise ValueError(
                f"it takes {tiles:,} tiles, but --method {config.method} differentiates through all of them at once, "
                f"and memory holds {limit:,}: use --method ddnm, or a smaller photo"
            )
        return _Work(photo, task, hashes)

    call = {**_call_options(pipeline, config), "method": config.method, "eta": config.eta}

    def make(tasks: Sequence[Task], generators: list[torch.Generator]) -> Tensor:
        y = torch.cat([task.measurement for task in tasks])
        operator = common_operator(tasks)
        images: Any = restore(pipeline, y, operator, noise_std, generator=generators, size=tasks[0].size, **call).images
        return images

    settings = {
        "command": "restore",
        wanted: None if wanted == "mask" else getattr(config, wanted),
        "kernel": None if kernel is None else hashlib.sha256(kernel.numpy().tobytes()).hexdigest(),
        "noise_std": noise_std,
        "method": config.method,
        "noise_per_step": config.eta,
    }
    return _fill_folder(pipeline, photos, config, Path(config.output_dir), read, make, settings, show_progress)


def edit_photos(
    pipeline: DDPMPipelineCustom, photos: Sequence[Path], config: EditConfig, show_progress: bool = True
) -> Summary:
    """Edit photographs (SDEdit) into `config.output_dir`, each `<its name>.png`. As `restore_photos` otherwise."""
    channels, size = photo_channels(pipeline.unet.config.in_channels), image_size(pipeline.unet)
    call = _call_options(pipeline, config)

    def read(file: Path) -> _Work:
        photo = read_photo(file, channels)
        return _Work(photo, editing(photo, size, config.tiles), {"photo": _hash(file)})

    def make(tasks: Sequence[Task], generators: list[torch.Generator]) -> Tensor:
        images = torch.cat([task.measurement for task in tasks])
        edited: Any = edit(pipeline, images, config.strength, generator=generators, **call).images
        return edited

    settings = {"command": "edit", "strength": config.strength}
    return _fill_folder(pipeline, photos, config, Path(config.output_dir), read, make, settings, show_progress)


def _fill_folder(
    pipeline: DDPMPipelineCustom, photos: Sequence[Path], config: PhotoOptions, output_dir: Path, read: Reader,
    make: Maker, settings: dict[str, Any], show_progress: bool,
) -> Summary:  # fmt: skip
    check_writable(output_dir)
    outputs = _output_files(photos, output_dir, config.num_samples)
    labels = _labels(pipeline, config)
    settings = {
        **settings,
        **describe_sampling(
            pipeline, config.seed, 1, labels, num_inference_steps=config.num_inference_steps, timesteps="linspace",
            guidance_scale=config.guidance_scale,
        ),
        "tiles": config.tiles,
        "calibration": hashlib.sha256(json.dumps(pipeline.scheduler.config.get("_calibration")).encode()).hexdigest(),
    }  # fmt: skip
    del settings["batch_size"]

    # 1. Read every photograph once: what can't be done is known before the network is called
    failures: dict[Path, str] = {}
    pending: dict[Any, list[tuple[Path, int, dict[str, Any]]]] = defaultdict(list)
    existing, changed = 0, set()
    for file in photos:
        try:
            work = read(file)
        except ValueError as error:
            failures[file] = str(error)
            continue
        for k in range(config.num_samples):
            record = {**settings, **work.hashes, "seed": config.seed + k}
            if outputs[file, k].exists():
                check_same(outputs[file, k], record)
                existing += 1
            else:
                changed.add(file)
                pending[work.task.size, work.task.measurement.shape].append((file, k, record))
    if len(failures) == len(photos):
        raise ValueError("; ".join(f"{str(file)!r} was left out: {reason}" for file, reason in failures.items()) + ".")

    # 2. Make what is missing, photographs of one size together
    with lock_output_dir(output_dir):
        number, total = 0, sum(map(len, pending.values()))
        in_a_call = config.batch_size or fitting_batch_size(pipeline.unet)
        for (size, _), items in pending.items():
            batch_size = max(1, in_a_call // len(tile_corners(size, image_size(pipeline.unet))))
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                works = [read(file) for file, _, _ in batch]
                title = f"Images {number + 1} to {number + len(batch)} of {total}"
                pipeline.set_progress_bar_config(desc=title, disable=not show_progress)
                generators = [torch.Generator().manual_seed(config.seed + k) for _, k, _ in batch]
                images = make([work.task for work in works], generators).float().cpu()
                for (file, k, record), work, image in zip(batch, works, images, strict=True):
                    save_photo(outputs[file, k], work.task.finish(image), work.photo, record)
                number += len(batch)
        # 3. Where the results of a photograph differ
        if config.num_samples > 1:
            for file in photos:
                picture = _std_file(output_dir, file)
                if file not in failures and (file in changed or not picture.exists()):
                    _save_std(picture, [outputs[file, k] for k in range(config.num_samples)], settings)
    return Summary(total, existing, failures)


def _number_of_tiles(task: Task, tile: tuple[int, int]) -> int:
    hole = task.operator.hole if isinstance(task.operator, Inpaint) else None
    return len(tile_corners(task.size, tile, hole))


def _output_files(photos: Sequence[Path], output_dir: Path, num_samples: int) -> dict[tuple[Path, int], Path]:
    """Where result k of each photograph goes.

    Raises:
        ValueError: where two results, or a result and a photograph, would be one file.
    """
    if len(set(photos)) < len(photos):
        twice = next(file for file in photos if list(photos).count(file) > 1)
        raise ValueError(f"{str(twice)!r} was given twice: name every photo once.")
    outputs = {
        (file, k): output_dir / (f"{file.stem}.png" if k == 0 else f"{file.stem}-{k}.png")
        for file in photos
        for k in range(num_samples)
    }
    owners: dict[Path, Path] = {}
    stds = {(file, -1): _std_file(output_dir, file) for file in photos} if num_samples > 1 else {}
    for (file, _), output in (outputs | stds).items():
        if output in owners:
            raise ValueError(
                f"{str(owners[output])!r} and {str(file)!r} would both be written to {str(output)!r}: rename one, or "
                "give each its own --output_dir."
            )
        owners[output] = file
    taken = {file.resolve() for file in photos} & {output.resolve() for output in owners}
    if taken:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} is where {str(sorted(taken)[0])!r} lies, which would be replaced by its "
            "result: choose another one."
        )
    return outputs


def _std_file(output_dir: Path, photo: Path) -> Path:
    return output_dir / f"{photo.stem}-std.png"


def _save_std(picture: Path, files: Sequence[Path], settings: dict[str, Any]) -> None:
    """The standard deviation of each pixel over several images, its channels averaged: black is 0, white 0.5."""
    images = torch.stack([read_photo(file, 3).image[0] for file in files])
    std = images.std(0, correction=0).mean(0, keepdim=True) / WIDEST_STD
    save_photo(picture, to_uint8(2 * std - 1), Photo(std), settings)


def _call_options(pipeline: DDPMPipelineCustom, config: PhotoOptions) -> dict[str, Any]:
    labels = _labels(pipeline, config)
    return {
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
        "class_labels": labels and labels[0],
    }


def _labels(pipeline: DDPMPipelineCustom, config: PhotoOptions) -> list[int] | None:
    return None if config.class_label is None else parse_labels([config.class_label], pipeline.unet.config)


def _kernel(deblur: str) -> Tensor:
    """The kernel of a blur, (h, w), from a standard deviation or a file."""
    try:
        std = float(deblur)
    except ValueError:
        try:
            kernel = read_kernel(Path(deblur))
        except ValueError as error:
            raise ValueError(
                f"`deblur` is {deblur!r}, but must be a positive number or an image of a kernel: {error}."
            ) from error
        return Blur(kernel).kernel
    if not 0 < std < float("inf"):
        raise ValueError(f"`deblur` is {deblur}, but must be a positive number of pixels, or an image of a kernel.")
    return Blur.gaussian(std).kernel


def _mask_of(photo: Path, mask: Path) -> Path:
    """The mask of a photograph: the file itself, or the one of its name in a folder."""
    if not mask.is_dir():
        return mask
    found = sorted(file for file in mask.iterdir() if file.stem == photo.stem)
    if len(found) != 1:
        raise ValueError(
            f"the folder of masks {str(mask)!r} has {len(found)} files named {photo.stem!r}, but needs one"
        )
    return found[0]


def _hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
