"""What a person who watches a run sees of it: `report.html`, and each trouble in a line as it is found.

Both are made in the main process from what the log and its pictures hold, so a resumed run continues them.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data.dataset import Images
from ..data.pictures import image_grid, tile_side, to_pil
from ..data.pixels import normalize, to_uint8
from ..data.sources import public_name
from ..progress import write
from ..storage.checkpoint import best_step
from ..storage.files import write_text_atomically
from .copies import Copies, TrainingImages
from .interruption import Interrupted
from .log import TrainingLog
from .losses import trivial_loss
from .output_folder import RECIPE, REPORT
from .report_page import Contents, render
from .state import Run
from .trouble import FIRST_UPDATES, Trouble, in_average, in_copies, in_data, in_log, in_samples, in_validations

TROUBLES = "trouble.jsonl"
LOOKED_AT = 64  # images
SHOWN = 8  # samples in a row
ROWS = 10  # of earlier samples
SIDE = 96  # pixels of a sample in a row
GRID = 720  # and of a grid


@dataclass
class Report:
    """A run as a person watches it.

    Attributes:
        real: images of the training set, uint8 of shape (N, C, H, W).
        training_images: what samples are compared with; None for a large set.
        troubles: those found so far, by the update after which they were.
        copies: of the newest samples, and of images that are held out.
    """

    run: Run
    log: TrainingLog
    real: Tensor
    training_images: TrainingImages | None
    troubles: list[tuple[int, Trouble]] = field(default_factory=list)
    samples: Tensor | None = None
    copies: Copies | None = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.first_step = self.run.step
        self.trivial = trivial_loss(
            self.run.scheduler.process, self.run.config, float(normalize(self.real).square().mean())
        )
        if self.run.accelerator.is_main_process:
            self._read_troubles()
            self.found(in_data(self.real, self.run.plan.num_images))

    # --- trouble ----------------------------------------------------------------------------------------------------

    @property
    def file(self) -> Path:
        """Where troubles are recorded."""
        return self.log.file.parent / TROUBLES

    def found(self, troubles: Iterable[Trouble]) -> None:
        """Print and record each kind of trouble, once. In the main process."""
        for trouble in troubles:
            if trouble.name not in {known.name for _, known in self.troubles}:
                self.troubles.append((self.run.step, trouble))
                write(f"Warning: {trouble}")
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"step": self.run.step, **trouble._asdict()}) + "\n")

    def _read_troubles(self) -> None:
        """Those of the earlier parts of the run; later ones are dropped."""
        lines = self.file.read_text("utf-8", errors="replace").splitlines() if self.file.is_file() else []
        for line in lines:
            try:
                entry = json.loads(line)
                step, trouble = int(entry.pop("step")), Trouble(**entry)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # a line cut off, or not ours
                continue
            if 0 < step <= self.run.step:
                self.troubles.append((step, trouble))
        text = "".join(json.dumps({"step": step, **trouble._asdict()}) + "\n" for step, trouble in self.troubles)
        if text or lines:
            write_text_atomically(self.file, text)

    def look(self) -> None:
        """After an entry of the log: look for trouble in it."""
        if self.log.entries and self.log.entries[-1]["step"] == self.run.step:
            is_fp16 = self.run.accelerator.scaler is not None
            self.found(in_log(self.log.entries, self.run.config, self.trivial, is_fp16=is_fp16))

    # --- samples ----------------------------------------------------------------------------------------------------

    def show(self, samples: dict[str, Tensor]) -> None:
        """After sampling: keep the grids, compare them with training images, and write the page.

        All processes must call it.

        Args:
            samples: by name, as `previews.sample_previews` returns them.
        """
        run = self.run
        self.log.pictures({name: image_grid(to_pil(pixels)) for name, pixels in samples.items()}, run.step)
        self.samples = samples["test_samples"]
        if self.training_images is not None:
            self.copies = self.training_images.nearest(self.samples)
            run.copies = self._in_validation() or _copies(self.copies.number, len(self.samples))
        if run.accelerator.is_main_process:
            self.found(in_average(self.log.entries))
            if run.step >= max(FIRST_UPDATES, run.plan.max_steps / 2):
                self.found(in_samples(self.samples, self.real))
            if self.copies is not None:
                self.found(in_copies(self.copies.number, len(self.samples), 0.0))
        self.write()

    def measured(self) -> None:
        """After a validation: look for overfitting and copies, and write the page."""
        run = self.run
        if run.accelerator.is_main_process:
            validations = self.log.validations()
            if run.config.early_stopping_patience is None:
                self.found(in_validations(validations, run.config))
            if validations and "eval_copies" in validations[-1]:
                share, expected = (validations[-1][f"eval_copies{of}"] for of in ("", "_of_held_out"))
                self.found(in_copies(round(share * run.config.eval_images), run.config.eval_images, expected))
                run.copies = self._in_validation()
        self.write()

    def _in_validation(self) -> str:
        """How many samples copied a training image when these weights were validated, in words, if they were."""
        count = self.run.config.eval_images
        for entry in self.log.validations():
            if entry["step"] == self.run.step and "eval_copies" in entry:
                held_out = round(entry["eval_copies_of_held_out"] * count)
                return (
                    f"{_copies(round(entry['eval_copies'] * count), count)}; of as many held-out images, {held_out} do"
                )
        return ""

    # --- the page ---------------------------------------------------------------------------------------------------

    def write(self, end: str = "") -> None:
        """Write `report.html`, in the main process.

        Args:
            end: how the run ended, in a sentence; empty while it runs.
        """
        if not self.run.accelerator.is_main_process:
            return
        try:
            write_text_atomically(Path(self.run.config.output_dir) / REPORT, render(self._contents(end)))
        except OSError as error:  # no reason to end a run
            write(f"No report after update {self.run.step:,}: {error}")

    def grids(self) -> tuple[Image.Image, Image.Image]:
        """The newest samples, and as many real images."""
        real = self.real[: self.run.config.eval_batch_size]
        return image_grid(to_pil(real if self.samples is None else self.samples)), image_grid(to_pil(real))

    def summary(self) -> str:
        """Copies and troubles, a line each, for the end of a run."""
        copies = f"  copies    {self.run.copies}\n" if self.run.copies else ""
        return copies + "".join(f"  warning   {trouble}\n" for _, trouble in self.troubles)

    def _contents(self, end: str) -> Contents:
        run, config = self.run, self.run.config
        folder, now = Path(config.output_dir), datetime.now(UTC)
        return Contents(
            title=f"Training {folder.absolute().name}",
            state=f"{end or self._state()} This page was written on {now:%Y-%m-%d at %H:%M:%S} UTC.",
            is_running=not end,
            progress=min(1.0, self._latest() / run.plan.max_steps) if run.clock is None else run.clock.fraction,
            explanation=_explanation(run),
            facts=_facts(run),
            troubles=self.troubles,
            samples=None if self.samples is None else _png(image_grid(to_pil(self.samples)), GRID),
            real=_png(image_grid(to_pil(self.real[: config.eval_batch_size])), GRID),
            history=self._history(),
            nearest=self._pairs(),
            copies=f"{run.copies}." if run.copies else "",
            entries=self.log.entries,
            best=best_step(folder) if config.eval_steps is not None else None,
            metric=config.metric_for_best_model,
        )

    def _latest(self) -> int:
        """The last update of the run, which may have returned to its best checkpoint since."""
        return max([self.run.step, *(entry["step"] for entry in self.log.entries[-1:])])

    def _state(self) -> str:
        run = self.run
        left, done = run.plan.max_steps - run.step, run.step - self.first_step
        of_all = f"{'about ' if run.clock is not None else ''}{run.plan.max_steps:,}"
        text = f"Running: {run.step:,} of {of_all} updates are done."
        if done:
            seconds = (time.perf_counter() - self.started) / done * left
            if run.clock is not None:
                seconds = run.clock.left()
            text += f" About {_duration(seconds)} left, at {run.images_seen / run.seconds:,.0f} images per second."
        return text

    def _history(self) -> list[tuple[int, bytes]]:
        """Some samples of earlier times, read back from the grids of the log."""
        files = {}
        for file in self.log.file.parent.glob("test_samples-*.png"):
            number = file.stem.rpartition("-")[2]
            if number.isdecimal() and int(number) <= self._latest():
                files[int(number)] = file
        steps = sorted(files)
        if len(steps) > ROWS:  # the first, the last, and some between
            steps = [steps[round(i * (len(steps) - 1) / (ROWS - 1))] for i in range(ROWS)]
        rows = []
        for step in steps:
            with Image.open(files[step]) as grid:
                tiles = _tiles(grid.convert("RGB"), tile_side(self.run.config.resolution))
            rows.append((step, _png(_row(tiles), SHOWN * SIDE)))
        return rows

    def _pairs(self) -> bytes | None:
        """Samples above their nearest training images, those most like them first."""
        if self.copies is None or self.samples is None or self.training_images is None:
            return None
        order = self.copies.ratios.argsort()[:SHOWN]
        real = self.training_images.pixels[self.copies.indices[order]]
        rows = [_row([image_grid([tile]) for tile in to_pil(pixels)]) for pixels in (self.samples[order], real)]
        both = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
        both.paste(rows[0], (0, 0))
        both.paste(rows[1], (0, rows[0].height))
        return _png(both, SHOWN * SIDE)


@contextmanager
def watching(run: Run, log: TrainingLog, images: Images, training_images: TrainingImages | None) -> Iterator[Report]:
    """A report for the duration of a run; one that ends before its end says why. All processes must enter it."""
    with run.agreement.together():
        real = to_uint8(normalize(images.sample(max(LOOKED_AT, run.config.eval_batch_size), run.config.seed)))
        report = Report(run, log, real, training_images)
    report.write()
    try:
        yield report
    except Interrupted:
        report.write(
            f"Interrupted after {run.step:,} of {run.plan.max_steps:,} updates: it resumes with "
            "`--resume_from_checkpoint latest`."
        )
        raise
    except Exception as error:
        if run.accelerator.is_main_process:
            report.look()
        report.write(f"Failed after {run.step:,} of {run.plan.max_steps:,} updates: {error}")
        raise


def _copies(count: int, samples: int) -> str:
    return f"{count:,} of {samples:,} samples copy a training image"


def _explanation(run: Run) -> list[str]:
    config, plan = run.config, run.plan
    name, _ = public_name(config, run.dataset)
    count = f"{plan.num_images:,} images" if plan.num_images else "a stream of images"
    length = f"in {plan.max_steps:,} updates" if run.clock is None else f"for {config.time_budget} in updates"
    color = {1: "in shades of grey", 3: "in colour"}.get(config.channels or 3, "with transparency")
    texts = [
        f"A network learns to draw images like those of {name}: {count}, at {config.resolution}×{config.resolution} "
        f"pixels, {color}. It is shown these images under more or less noise, and learns to tell the image from the "
        f"noise. To draw, it starts from nothing but noise and removes it in "
        f"{config.ddpm_num_inference_steps:,} steps: other noise becomes another image.",
        f"It learns {length}, each of which shows it {plan.global_batch:,} images and corrects it a little"
        + (
            f": {plan.max_steps * plan.global_batch / plan.num_images:,.1f} passes over the images."
            if plan.num_images and run.clock is None
            else "."
        ),
    ]
    if run.num_classes:
        texts.append(f"It learns {run.num_classes:,} classes, and draws the one that it is told to.")
    if run.ema is not None:
        texts.append("What is kept is an average of its weights over the latest updates, which draws better than they.")
    return texts


def _facts(run: Run) -> list[tuple[str, str]]:
    config, plan = run.config, run.plan
    held_out = f"{config.eval_images:,} images, every {config.eval_steps:,} updates" if config.eval_steps else "none"
    return [
        ("Network", f"{run.network.num_parameters():,} parameters (the numbers that it learns)"),
        (
            "Predicts",
            {"epsilon": "the noise", "sample": "the image"}.get(config.prediction_type, "a mixture of image and noise"),
        ),
        ("Learning rate", f"{config.learning_rate:g} at its peak, {config.lr_scheduler.replace('_', ' ')}"),
        ("Held out to measure on", held_out),
        ("Computed on", f"{plan.num_processes} × {run.accelerator.device.type}"),
        ("All options", f"{RECIPE if run.clock else f'{config.logging_dir}/config.json'}, beside this page"),
    ]


def _duration(seconds: float) -> str:
    """A duration for people, of one or two units."""
    if seconds < 60:
        return "less than a minute"
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


def _tiles(grid: Image.Image, side: int) -> list[Image.Image]:
    columns = max(1, grid.width // side)
    return [
        grid.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
        for y in range(grid.height // side)
        for x in range(columns)
    ][:SHOWN]


def _row(tiles: list[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(tile.width for tile in tiles), tiles[0].height), "white")
    for i, tile in enumerate(tiles):
        row.paste(tile, (i * tile.width, 0))
    return row


def _png(image: Image.Image, most: int) -> bytes:
    """A PNG that is at most as wide."""
    if image.width > most:
        image = image.resize((most, max(1, round(image.height * most / image.width))), Image.Resampling.BOX)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
