"""`ddpm-hf restore`, `ddpm-hf edit` and `ddpm-hf interpolate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.restoration import EditConfig, InterpolateConfig, RestoreConfig
from .model import load_on_device

if TYPE_CHECKING:
    from ..restoration.folder import Summary


def restore(model: str, photos: Sequence[str], config: RestoreConfig) -> Path:
    """Restore photographs; returns the folder of the results."""
    from ..restoration.folder import restore_photos

    return _work_on(restore_photos, model, photos, config)


def edit(model: str, photos: Sequence[str], config: EditConfig) -> Path:
    """Edit photographs; returns the folder of the results."""
    from ..restoration.folder import edit_photos

    return _work_on(edit_photos, model, photos, config)


def interpolate(model: str, a: str, b: str, config: InterpolateConfig) -> Path:
    """Write a strip and an animation from one photograph to another; returns the path of the strip."""
    from ..restoration.strip import interpolate_photos

    for file in (a, b):
        if not Path(file).is_file():
            raise ValueError(f"there is no file {file!r}.")
    strip = interpolate_photos(load_on_device(model, config.revision, config.device), Path(a), Path(b), config)
    print(f"From one photo to the other: {strip} and {strip.with_suffix('.gif')}.")
    return strip


def _work_on(
    work: Callable[..., Summary], model: str, photos: Sequence[str], config: RestoreConfig | EditConfig
) -> Path:
    """Do it, and print what was made.

    Raises:
        ValueError: before the model is loaded, if there is no such file; in the end, if a photograph was left out.
    """
    from ..sampling.batch_size import out_of_memory_explained

    files = [Path(photo) for photo in photos]
    if not any(file.is_file() for file in files):
        raise ValueError(f"there is no file {photos[0]!r}.")
    pipeline: Any = load_on_device(model, config.revision, config.device)
    remedy = "Pass a smaller --batch_size, smaller photos, or --method ddnm. What was made before is kept."
    with out_of_memory_explained(remedy):
        summary = work(pipeline, files, config)
    print(f"Images in {config.output_dir}/: {summary.made} new, {summary.existing} from before.")
    if summary.failures:
        reasons = "; ".join(f"{str(file)!r}: {reason}" for file, reason in summary.failures.items())
        raise ValueError(f"{len(summary.failures)} of {len(files)} photos were left out. {reasons}.")
    return Path(config.output_dir)
