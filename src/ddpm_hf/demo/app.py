"""`ddpm-hf demo`: a Gradio app for one model, for any number of visitors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.pictures import image_grid, to_pil
from ..diffusion.ddpm_labels import label_names
from ..diffusion.pipeline import DDPMPipelineCustom, image_size
from ..restoration.edit import edit
from ..restoration.operators import Downsample, Grayscale, Inpaint, Operator
from ..restoration.restore import restore
from ..storage.loading import load_pipeline
from .live import Frame, sample_live

MAX_IMAGES = 16
MAX_WAITING = 20  # visitors in the queue
SECONDS_BETWEEN_VIEWS = 0.15  # of a sampling that is watched
STATE_SECONDS = 1800  # that a visitor's trajectory is kept
UPLOAD_PIXELS = 1024  # of the longer side of a photograph in an editor
VIEW_PIXELS = 400  # of the grid that is watched, at least half of it
VIEWS = {"x_t, the noisy image": "x_t", "x̂_0, what the network expects": "x_0"}
CSS = """
.pixels img { image-rendering: pixelated; }
@media (max-width: 600px) { .pixels .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; } }
"""
# Nothing is loaded from elsewhere, fonts included.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

PAINTED, ENLARGED_2, ENLARGED_4, GRAY = "painted over", "2 times too small", "4 times too small", "gray"


def launch(pipeline: DDPMPipelineCustom, title: str, wait: bool = True) -> gr.Blocks:
    """Serve the app, until the process ends if `wait`. Gradio's own environment variables choose address and port."""
    app = build_app(pipeline, title)
    app.queue(max_size=MAX_WAITING).launch(
        css=CSS, theme=THEME, show_error=True, footer_links=["api"], prevent_thread_lock=not wait
    )
    return app


def launch_model(model: str, revision: str | None, title: str) -> None:
    """Load a model onto the best device and serve the app; of a model that can't be loaded, serve the reason."""
    try:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        launch(load_pipeline(model, revision).to(device or torch.device("cpu")), title)
    except ValueError as error:
        with gr.Blocks(title=title, analytics_enabled=False) as app:
            gr.Markdown(f"# {_plain(title)}\n\nThe model can't be loaded: {_plain(str(error))}")
        print(f"error: {error}")
        app.launch(theme=THEME)


def build_app(pipeline: DDPMPipelineCustom, title: str) -> gr.Blocks:
    """The app: sampling with its trajectory, restoration, and editing.

    One visitor at a time computes: a network uses the whole machine, and those who wait see their place.

    Args:
        pipeline: on its device.
        title: the heading.
    """
    pipeline.set_progress_bar_config(disable=True)
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=False) as app:
        gr.Markdown(f"# {_plain(title)}")
        with gr.Tab("Sample"):
            _sampling_tab(pipeline)
        if pipeline.unet.config.in_channels in (1, 3):
            with gr.Tab("Restore"):
                _restoration_tab(pipeline)
            with gr.Tab("Edit"):
                _editing_tab(pipeline)
    return app


# --- sampling ---------------------------------------------------------------------------------------------------------


def _sampling_tab(pipeline: DDPMPipelineCustom) -> None:
    is_calibrated = pipeline.scheduler.config.get("_calibration") is not None
    T = pipeline.scheduler.config.num_train_timesteps
    with gr.Row():
        with gr.Column(scale=1):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images")
            steps = gr.Slider(1, T, min(25, T), step=1, label="Steps")
            eta = gr.Slider(0, 1, 0, label="eta: 0 is DDIM, 1 is DDPM")
            order = gr.Radio([1, 2], value=2, label="Solver order")
            spacings = ["trailing", "linspace", "leading", *(["optimal"] if is_calibrated else [])]
            spacing = gr.Radio(spacings, value="trailing", label="Spacing")
            label, guidance = _class_inputs(pipeline)
            with gr.Row():
                start = gr.Button("Sample", variant="primary")
                again = gr.Button("Next seed")
                stop = gr.Button("Stop")
        with gr.Column(scale=2):
            view = gr.Image(
                label="x̂_0, while it is sampled", alt_text="The images as a grid", format="png",
                interactive=False, buttons=["fullscreen", "download"],
                elem_classes="pixels", elem_id="view",
            )  # fmt: skip
            with gr.Row():
                place = gr.Slider(1, 2, 1, step=1, label="Trajectory: frame", interactive=False)
                kind = gr.Radio(list(VIEWS), value=next(iter(VIEWS)), label="Show")
            status = gr.Textbox(label="Status", interactive=False, max_lines=2, elem_id="status")
            gallery = gr.Gallery(
                label="Images", format="png", object_fit="contain", elem_classes="pixels", columns=4, elem_id="images"
            )
    frames = gr.State([], time_to_live=STATE_SECONDS)

    def sample(seed: int, count: int, steps: int, eta: float, order: int, spacing: str, label: Any, guidance: float
               ) -> Iterator[Any]:  # fmt: skip
        _check_seed(seed, count)
        started = viewed = time.monotonic()
        kept: list[Frame] = []
        named = {} if spacing == "optimal" else {"timestep_spacing": spacing}
        options = {
            "num_inference_steps": int(steps), "eta": eta, "solver_order": order, "guidance_scale": guidance,
            "timesteps": "optimal" if spacing == "optimal" else None, "class_labels": _labels(pipeline, label, count),
        }  # fmt: skip
        scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **named)
        yield {gallery: [], status: "Sampling…", frames: [], place: gr.Slider(1, 2, 1, interactive=False)}
        with _readable():
            for new in sample_live(pipeline, int(seed), int(count), scheduler, **options):
                kept += new
                if time.monotonic() - viewed > SECONDS_BETWEEN_VIEWS:
                    viewed = time.monotonic()
                    yield {view: _grid(new[-1].x_0), status: f"Step {new[-1].number} of {new[-1].total}"}
        seconds = time.monotonic() - started
        yield {
            view: _grid(kept[-1].x_t), gallery: _captioned(_visible(kept[-1].x_t), seed), frames: kept,
            place: gr.Slider(1, max(len(kept), 2), len(kept), interactive=len(kept) > 1),
            status: f"{int(count)} images of {int(steps)} steps in {seconds:.1f} s",
        }  # fmt: skip

    def show(frames: list[Frame], place: int, kind: str) -> dict[Any, Any]:
        if not frames:
            return {view: gr.skip()}
        frame = frames[min(int(place), len(frames)) - 1]
        return {
            view: _grid(getattr(frame, VIEWS[kind])),
            status: f"After step {frame.number} of {frame.total} (t = {frame.timestep})",
        }

    inputs, outputs = [seed, count, steps, eta, order, spacing, label, guidance], [view, gallery, status, frames, place]
    computing: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", "show_progress_on": [status]}
    first = start.click(sample, inputs, outputs, api_name="sample", **computing)
    second = again.click(lambda s, n: s + n, [seed, count], seed, queue=False, api_visibility="private").then(
        sample, inputs, outputs, api_visibility="private", **computing
    )
    stop.click(lambda: "Stopped.", None, status, cancels=[first, second], queue=False, api_visibility="private")
    for event in (place.input, kind.input):
        event(
            show, [frames, place, kind], [view, status], queue=False, show_progress="hidden", api_visibility="private"
        )


def _class_inputs(pipeline: DDPMPipelineCustom) -> tuple[Any, Any]:
    """Inputs for the class and the guidance, which an unconditional model hides."""
    classes = pipeline.unet.config.num_class_embeds
    names = label_names(pipeline.unet.config)
    choices = [(names[i] if i < len(names) else str(i), i) for i in range(classes or 0)]
    label = gr.Dropdown([("all, in turn", -1), *choices], value=-1, label="Class", visible=bool(classes))
    return label, gr.Slider(0, 10, 1, label="Guidance: 1 is none", visible=bool(classes))


def _labels(pipeline: DDPMPipelineCustom, label: int | None, count: int) -> list[int] | None:
    classes = pipeline.unet.config.num_class_embeds
    if classes is None:
        return None
    named = len(label_names(pipeline.unet.config)) or classes
    return [i % named if label is None or label < 0 else int(label) for i in range(int(count))]


# --- given images -----------------------------------------------------------------------------------------------------


def _restoration_tab(pipeline: DDPMPipelineCustom) -> None:
    (height, width), T = image_size(pipeline.unet), pipeline.scheduler.config.num_train_timesteps
    gr.Markdown(f"Images are cropped and resized to the model's {width}×{height} pixels.")
    damages = [PAINTED, *(name for name, f in ((ENLARGED_2, 2), (ENLARGED_4, 4)) if height % f == width % f == 0)]
    if pipeline.unet.config.in_channels == 3:
        damages.append(GRAY)
    with gr.Row():
        with gr.Column():
            editor = _editor("Image", brush=gr.Brush(colors=["#ff00ff"]), elem_id="restore-image")
            damage = gr.Radio(damages, value=damages[0], label="The image is")
            count, seed = gr.Slider(1, 4, 2, step=1, label="Images"), gr.Number(0, label="Seed", precision=0, minimum=0)
            steps = gr.Slider(1, min(200, T), min(25, T), step=1, label="Steps")
            label, _ = _class_inputs(pipeline)
            start = gr.Button("Restore", variant="primary")
        with gr.Column():
            gallery = gr.Gallery(
                label="Restored",
                elem_id="restored",
                format="png",
                object_fit="contain",
                elem_classes="pixels",
                columns=2,
            )

    def run(image: dict[str, Any], damage: str, count: int, seed: int, steps: int, label: int) -> list[Any]:
        _check_seed(seed, count)
        x, painted = _given(pipeline, image)
        if damage == PAINTED and not painted.any():
            raise _error("Nothing is painted over: paint over what the model is to invent.")
        operators: dict[str, Callable[[], Operator]] = {
            PAINTED: lambda: Inpaint(~painted), ENLARGED_2: lambda: Downsample(2), ENLARGED_4: lambda: Downsample(4),
            GRAY: Grayscale,
        }  # fmt: skip
        operator = operators[damage]()
        with _readable():
            y = operator(x).clamp(0, 1)
            output: Any = restore(
                pipeline, y.repeat(int(count), *(1,) * (y.ndim - 1)), operator, num_inference_steps=int(steps),
                generator=_generators(seed, count), class_labels=_labels(pipeline, label, count),
            )  # fmt: skip
        return [(_once(_picture(y[0])), "what is known"), *_captioned([_picture(x) for x in output.images], seed)]

    inputs = [editor, damage, count, seed, steps, label]
    start.click(run, inputs, gallery, concurrency_limit=1, concurrency_id="network", api_name="restore")


def _editing_tab(pipeline: DDPMPipelineCustom) -> None:
    T = pipeline.scheduler.config.num_train_timesteps
    gr.Markdown("Draw, or paint over an image: the model makes of it what it has learned (SDEdit).")
    with gr.Row():
        with gr.Column():
            editor = _editor("Drawing", elem_id="edit-image")
            strength = gr.Slider(0.01, 1, 0.5, label="Strength: 1 is a new image")
            count, seed = gr.Slider(1, 4, 2, step=1, label="Images"), gr.Number(0, label="Seed", precision=0, minimum=0)
            steps = gr.Slider(1, min(200, T), min(50, T), step=1, label="Steps")
            label, guidance = _class_inputs(pipeline)
            start = gr.Button("Edit", variant="primary")
        with gr.Column():
            gallery = gr.Gallery(
                label="Edited", elem_id="edited", format="png", object_fit="contain", elem_classes="pixels", columns=2
            )

    def run(image: dict[str, Any], strength: float, count: int, seed: int, steps: int, label: int, guidance: float
            ) -> list[Any]:  # fmt: skip
        _check_seed(seed, count)
        x, _ = _given(pipeline, image)
        with _readable():
            output: Any = edit(
                pipeline, x.repeat(int(count), 1, 1, 1), strength, num_inference_steps=int(steps),
                generator=_generators(seed, count), class_labels=_labels(pipeline, label, count),
                guidance_scale=guidance,
            )  # fmt: skip
        return _captioned([_picture(x) for x in output.images], seed)

    inputs = [editor, strength, count, seed, steps, label, guidance]
    start.click(run, inputs, gallery, concurrency_limit=1, concurrency_id="network", api_name="edit")


def _editor(label: str, **options: Any) -> gr.ImageEditor:
    """An editor, and a button that puts an image into it.

    The editor's own upload loses, without a word, a file that is chosen before its canvas has started, which takes
    seconds on a busy machine. The value of a component waits for it.
    """
    upload = gr.UploadButton("Upload an image", file_types=["image"], type="filepath", size="sm")
    editor = gr.ImageEditor(label=label, type="pil", format="png", sources=[], layers=False, **options)
    upload.upload(_opened, upload, editor, queue=False, api_visibility="private")
    return editor


def _opened(file: str) -> dict[str, Any]:
    """An uploaded image as the value of an editor, upright, not larger than needed and large enough for a brush."""
    try:
        with Image.open(file) as stored:
            if stored.mode == "F" or stored.mode.startswith("I"):
                raise ValueError("it has more than 8 bits per channel")
            image = ImageOps.exif_transpose(stored).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _error(f"This image can't be used: {error}.") from error
    image.thumbnail((UPLOAD_PIXELS, UPLOAD_PIXELS))
    image = ImageOps.scale(image, max(1, VIEW_PIXELS // max(image.size)), Image.Resampling.NEAREST)
    return {"background": _once(image), "layers": [], "composite": image}


def _given(pipeline: DDPMPipelineCustom, image: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
    """The visitor's image as the model sees it, (1, C, H, W) in [0, 1], and what is painted over of it, bool (H, W)."""
    if not image or image.get("composite") is None:
        raise _error("There is no image: upload one, or draw.")
    height, width = image_size(pipeline.unet)
    mode = "L" if pipeline.unet.config.in_channels == 1 else "RGB"

    def fitted(picture: Image.Image) -> Image.Image:
        return ImageOps.fit(picture, (width, height), Image.Resampling.BOX)

    composite = image["composite"].convert("RGBA")
    canvas = Image.alpha_composite(Image.new("RGBA", composite.size, "black" if mode == "L" else "white"), composite)
    pixels = np.atleast_3d(np.asarray(fitted(canvas.convert(mode)), np.float32) / 255)
    painted = torch.zeros(height, width, dtype=torch.bool)
    for layer in image.get("layers") or []:
        painted |= torch.from_numpy(np.array(fitted(layer.convert("RGBA").getchannel("A"))) > 0)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous(), painted


def _generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed) + i) for i in range(int(count))]


def _picture(x: Tensor) -> Image.Image:
    x = x.float().cpu()
    return to_pil(((x if x.ndim == 3 else x[None])[None] * 255).round().to(torch.uint8))[0]


def _captioned(images: Sequence[Image.Image], seed: int) -> list[tuple[Image.Image, str]]:
    return [(_once(image), f"seed {int(seed) + i}") for i, image in enumerate(images)]


def _once(image: Image.Image) -> Image.Image:
    """The image, marked so that its file differs from those of equal images.

    Gradio names files by their content, and writes over one that another visitor may be loading.
    """
    image.info["shown as"] = uuid.uuid4().hex  # Gradio writes texts of `info` into the PNG
    return image


def _visible(pixels: Tensor) -> list[Image.Image]:
    """uint8 (B, C, H, W) as images; of channels that are neither gray nor colors the first."""
    return to_pil(pixels if pixels.shape[1] in (1, 3) else pixels[:, :1])


def _grid(pixels: Tensor) -> Image.Image:
    grid = image_grid(_visible(pixels))
    return _once(ImageOps.scale(grid, max(1, VIEW_PIXELS // max(grid.size)), Image.Resampling.NEAREST))


def _check_seed(seed: int | None, count: int) -> None:
    if seed is None or not 0 <= seed <= 2**63 - count:
        raise _error(f"The seed is {seed}, but must be an integer from 0 to 2^63 - {count}.")


@contextmanager
def _readable() -> Iterator[None]:
    """Errors of options become messages for the visitor."""
    try:
        yield
    except ValueError as error:
        raise _error(str(error)) from error


def _error(text: str) -> gr.Error:
    """A message for the visitor, which stays until it is closed."""
    return gr.Error(text, duration=None, print_exception=False)


def _plain(text: str, special: Sequence[str] = "\\`*_{}[]<>#") -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in special else c for c in text)
