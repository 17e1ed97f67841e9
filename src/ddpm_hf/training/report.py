"""What a person who watches a run sees of it: `report.html`, and each trouble in a line as it is found.

Both are made in the main process from what the log and its pictures hold, so a resumed run continues them. They never
end a run: what goes wrong with them is said once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..data.dataset import Images
from ..data.pictures import image_grid, to_pil
from ..data.pixels import normalize, to_uint8
from ..progress import write
from ..storage.checkpoint import best_step
from ..storage.files import write_text_atomically
from . import report_pictures, report_words
from .copies import Copies, TrainingImages
from .interruption import Interrupted
from .log import TrainingLog
from .losses import trivial_loss
from .output_folder import PLAN, REPORT, TROUBLES
from .report_page import Contents, render
from .state import Run
from .trouble import (
    FIRST_UPDATES,
    Trouble,
    in_average,
    in_copies,
    in_data,
    in_last_samples,
    in_log,
    in_samples,
    in_validations,
)

LOOKED_AT = 64  # images
Reasons = Sequence[tuple[str, str]]  # of a plan: what, and why


@dataclass
class Report:
    """A run as a person watches it.

    Attributes:
        real: images of the training set, uint8 of shape (N, C, H, W).
        training_images: what samples are compared with; None for a large set.
        reasons: of the plan of the run, which a resumed run finds in its folder.
        troubles: those found so far, by the update after which they were.
        copies: of the newest samples, and of images that are held out.
        has_failed: whether something has gone wrong with the page.
    """

    run: Run
    log: TrainingLog
    real: Tensor
    training_images: TrainingImages | None
    reasons: Reasons = ()
    troubles: list[tuple[int, Trouble]] = field(default_factory=list)
    samples: Tensor | None = None
    copies: Copies | None = None
    started: float = field(default_factory=time.perf_counter)
    has_failed: bool = False

    def __post_init__(self) -> None:
        self.first_step, self.folder = self.run.step, self.log.file.parent
        self.trivial = trivial_loss(
            self.run.scheduler.process, self.run.config, float(normalize(self.real).square().mean())
        )
        if self.run.accelerator.is_main_process:
            with self._never_raising():
                self._read_troubles()
                self.found(in_data(self.real, self.run.plan.num_images))
            with self._never_raising():
                file = self.folder / PLAN
                if self.reasons:
                    write_text_atomically(file, json.dumps(self.reasons, indent=1))
                elif file.is_file():
                    self.reasons = [(str(name), str(text)) for name, text in json.loads(file.read_text("utf-8"))]

    @contextmanager
    def _never_raising(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever files, pictures and their libraries raise
            if not self.has_failed:
                write(
                    f"Warning: {REPORT} is not up to date after update {self.run.step:,} ({error}). Training continues."
                )
            self.has_failed = True

    # --- trouble ----------------------------------------------------------------------------------------------------

    def found(self, troubles: Iterable[Trouble]) -> None:
        """Print and record each kind of trouble, once. In the main process."""
        for trouble in troubles:
            if trouble.name not in {known.name for _, known in self.troubles}:
                self.troubles.append((self.run.step, trouble))
                write(f"Warning: {trouble}")
                with (self.folder / TROUBLES).open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"step": self.run.step, **trouble._asdict()}) + "\n")

    def _read_troubles(self) -> None:
        """Those of the earlier parts of the run; later ones are dropped."""
        file = self.folder / TROUBLES
        lines = file.read_text("utf-8", errors="replace").splitlines() if file.is_file() else []
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
            write_text_atomically(file, text)

    def look(self) -> None:
        """After an entry of the log: look for trouble in it."""
        if self.log.entries and self.log.entries[-1]["step"] == self.run.step:
            is_fp16 = self.run.accelerator.scaler is not None
            with self._never_raising():
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
            run.copies = self._in_validation() or report_words.copies_in_words(self.copies.number, len(self.samples))
        if run.accelerator.is_main_process:
            with self._never_raising():
                self.found(in_average(self.log.entries))
                if run.step >= max(FIRST_UPDATES, run.plan.max_steps / 2):
                    self.found(in_samples(self.samples, self.real))
                if run.clock is not None and run.step == run.plan.max_steps:  # others may be tries of a few updates
                    self.found(in_last_samples(self.samples, self.real))
                if self.copies is not None:
                    self.found(in_copies(self.copies.number, len(self.samples), 0.0))
        self.write()

    def measured(self) -> None:
        """After a validation: look for overfitting and copies, and write the page."""
        run = self.run
        if run.accelerator.is_main_process:
            validations = self.log.validations()
            with self._never_raising():
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
                copies = report_words.copies_in_words(round(entry["eval_copies"] * count), count)
                return f"{copies}; of as many held-out images, {held_out} do"
        return ""

    # --- the page ---------------------------------------------------------------------------------------------------

    def write(self, end: str = "") -> None:
        """Write `report.html`, in the main process.

        Args:
            end: how the run ended, in a sentence; empty while it runs.
        """
        if self.run.accelerator.is_main_process:
            with self._never_raising():
                write_text_atomically(Path(self.run.config.output_dir) / REPORT, render(self._contents(end)))

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
        state = end or report_words.state(run, run.step - self.first_step, time.perf_counter() - self.started)
        latest = max(run.step, self.log.last_step())
        nearest = None
        if self.copies is not None and self.samples is not None and self.training_images is not None:
            nearest = report_pictures.nearest(self.samples, self.copies, self.training_images.pixels)
        return Contents(
            title=f"Training {folder.absolute().name}",
            state=f"{state} This page was written on {now:%Y-%m-%d at %H:%M:%S} UTC.",
            is_running=not end,
            progress=min(1.0, latest / run.plan.max_steps) if run.clock is None else run.clock.fraction,
            explanation=report_words.explanation(run),
            facts=report_words.facts(run, self.reasons),
            troubles=self.troubles,
            samples=None if self.samples is None else report_pictures.grid(self.samples),
            real=report_pictures.grid(self.real[: config.eval_batch_size]),
            history=report_pictures.history(self.folder, config.resolution, latest),
            nearest=nearest,
            copies=f"{run.copies}." if run.copies else "",
            entries=self.log.entries,
            best=best_step(folder) if config.eval_steps is not None else None,
            metric=config.metric_for_best_model,
        )


@contextmanager
def watching(
    run: Run, log: TrainingLog, images: Images, training_images: TrainingImages | None, reasons: Reasons = ()
) -> Iterator[Report]:
    """A report for the duration of a run; one that ends before its end says why. All processes must enter it."""
    with run.agreement.together():
        real = to_uint8(normalize(images.sample(max(LOOKED_AT, run.config.eval_batch_size), run.config.seed)))
        report = Report(run, log, real, training_images, reasons)
    report.write()
    try:
        yield report
    except (Interrupted, KeyboardInterrupt):
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
