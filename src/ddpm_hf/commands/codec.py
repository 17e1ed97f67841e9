"""`ddpm-hf compress` and `ddpm-hf decompress`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..config.codec import CompressConfig, DecompressConfig
from .model import load_on_device


def compress(model: str, photos: Sequence[str], config: CompressConfig) -> Path:
    """Compress images into one file; returns it."""
    from ..codec.compress import encode, gather
    from ..codec.lossy import Sent, encode_progressive
    from ..codec.lossy_report import Pictures, bound_points, report_page
    from ..codec.report import Report
    from ..codec.stack import coder_module
    from ..data.pictures import check_plotting
    from ..sampling.batch_size import out_of_memory_explained
    from ..sampling.generate import parse_labels
    from ..storage.files import check_writable, write_atomically, write_text_atomically

    if not config.is_lossy:
        coder_module()
    missing = next((photo for photo in photos if not Path(photo).is_file()), None)
    if missing is not None:
        is_folder = Path(missing).is_dir()
        raise ValueError(
            f"{missing!r} is a folder: pass its files, as in {missing}/*.png."
            if is_folder
            else f"there is no file {missing!r}."
        )
    output = Path(config.output_file)
    if output.resolve() in {Path(photo).resolve() for photo in photos}:
        raise ValueError(f"`output_file` {str(output)!r} is one of the images, which it would replace: choose another.")
    if output.is_dir():
        raise ValueError(f"`output_file` {str(output)!r} is a folder, but must be a file, such as images.ddpm.")
    check_writable(output.parent, "output_file")
    if config.report is not None:
        check_plotting()
        check_writable(Path(config.report).parent, "report")
    pipeline = load_on_device(model, config.revision, config.device)
    gathered = gather(list(photos), pipeline, config.tile)
    labels = None if config.class_label is None else parse_labels([config.class_label], pipeline.unet.config)
    shared: dict[str, Any] = {
        "num_inference_steps": config.num_inference_steps, "class_label": labels[0] if labels else None,
        "batch_size": config.batch_size, "model_name": model, "revision": config.revision, "show_progress": True,
    }  # fmt: skip
    pictures = Pictures()
    report: Report | Sent
    with out_of_memory_explained(f"`batch_size` is {config.batch_size}: pass a smaller --batch_size."):
        if config.is_lossy:
            data, report = encode_progressive(
                pipeline, gathered, bits_per_pixel=config.bits_per_pixel, target_psnr=config.target_psnr,
                shown=pictures, **shared,
            )  # fmt: skip
        else:
            spacing = config.timestep_spacing
            timesteps = pipeline.scheduler.config.timestep_spacing if spacing == "model" else spacing
            data, report = encode(pipeline, gathered, timesteps=timesteps, variance_type=config.variance_type, **shared)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda stream: stream.write(data))
    print("\n".join([f"{output}:", *report.lines()]))
    if config.report is not None and isinstance(report, Sent):
        bound = bound_points(
            pipeline, gathered.pixels, report.num_inference_steps, config.batch_size, shared["class_label"], True
        )
        page = report_page(report, pictures, gathered.pixels, bound, output.name)
        write_text_atomically(Path(config.report), page)
        print(f"The report is {config.report}.")
    return output


def decompress(file: str, model: str | None, config: DecompressConfig) -> Path:
    """Write the images of a file, or of the intact part of a progressive one; returns their folder."""
    from ..codec.container import read_header, unpack
    from ..codec.decompress import decode
    from ..codec.header import model_of
    from ..codec.lossy import decode_progressive
    from ..codec.pictures import format_of, to_image
    from ..codec.stack import coder_module
    from ..storage.files import check_writable, write_atomically

    if not Path(file).is_file():
        raise ValueError(f"there is no file {file!r}.")
    folder = Path(config.output_dir)
    check_writable(folder)
    data = Path(file).read_bytes()
    header, _ = read_header(data)
    is_progressive = header.get("codec") == "progressive"
    if not is_progressive:
        coder_module()
        unpack(data)  # damage is an error before the model is loaded
    found = model_of(header)
    name = model or found.name
    if name is None:
        raise ValueError(f"{file!r} does not name its model: pass it, as in ddpm-hf decompress {file} MODEL.")
    revision = config.revision or (found.revision if model is None else None)
    pipeline = load_on_device(name, revision, config.device or found.device)
    if is_progressive:
        received = decode_progressive(pipeline, data, finish=config.sample_rest, show_progress=True)
        images = received.images
    else:
        images = decode(pipeline, data, show_progress=True)
    folder.mkdir(parents=True, exist_ok=True)
    for picture, pixels in images:
        output = folder / picture.name
        write_atomically(output, partial(to_image(picture, pixels).save, format=format_of(output)))
    print(f"{len(images)} images in {folder}/.")
    if is_progressive and received.problem:
        print(received.description)
    return folder
