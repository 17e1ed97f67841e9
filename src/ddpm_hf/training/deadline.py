"""A run with a time budget: how much of its training is over, and when it has to end, whatever the machine's load.

Nothing here reads a clock but `Clock.reading`: the rest are functions of the times that they are given.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import median
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from ..config.training import TrainConfig
from .averages import LOSSES
from .plan import EVAL_CALLS, EVAL_SAMPLING_STEPS, KEPT_CHECKPOINTS, MIN_CALIBRATION_IMAGES, Plan

RECENT = 9  # updates, whose median is the time of one
MARGIN = 1.1  # of what follows the last update, since it is measured in a few updates or in none
# Seconds of one core for pictures, curve, card and the end of the process, and of a launcher (measured)
FINISHING, LAUNCHER_FINISHING = 0.8, 0.8
MAX_SLOWDOWN = 10.0
CALIBRATION_SHARE = 0.04  # of the budget, at most
MAX_CALIBRATION_IMAGES = 256
SECONDS_PER_CHECKPOINT = 600.0
MIN_CHECKPOINTS = 4
TICKS = 1_000_000  # in which diffusers' learning-rate schedules count the training time


@dataclass
class Clock:
    """The time of a run, in seconds.

    Args:
        budget: for the whole run, with its earlier parts.
        started: when the command began, on the clock of `time.monotonic`, less the time of the earlier parts.
        calls: network calls for one image, by what follows the last update: an estimate of its time until it has been
            measured. An update of B images is taken to be 3 B of them.
        finishing: seconds of one core at the very end, which other work on the machine lengthens.
        fraction: of the training time that is over, in [0, 1].
        first_update: the update at which the learning rate was at its start: 0, or where more time was granted.
    """

    budget: float
    started: float
    calls: Mapping[str, float] = field(default_factory=dict)
    images_per_update: int = 1  # of one process
    finishing: float = FINISHING
    fraction: float = 0.0
    first_update: int = 0
    elapsed: float | None = None  # as all processes have agreed
    update_seconds: float = 0.0
    reserve: float = 0.0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _slowdowns: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))  # by other work on the machine
    _measured: dict[str, float] = field(default_factory=dict)  # in updates

    def reading(self) -> tuple[float, float, float]:
        """What this process contributes to `advance`: the time that is over, that of an update, and the reserve."""
        seconds = median(self._recent) if self._recent else 0.0
        return time.monotonic() - self.started, seconds, self._needed(seconds)

    def advance(self, elapsed: float, update_seconds: float, reserve: float) -> None:
        """Advance to the largest `reading` of all processes, at the beginning of an update.

        The fraction is 1 at the beginning of the last update, and follows the time until then: where that time has
        moved, because the machine has become slower, say, what is left of the fraction is spread over what is left of
        the time.
        """
        self.update_seconds, self.reserve = update_seconds, reserve
        if self.elapsed is not None:
            left = self.budget - reserve - update_seconds - self.elapsed
            over = elapsed - self.elapsed
            self.fraction = 1.0 if over >= left else self.fraction + (1 - self.fraction) * over / left
        self.elapsed = elapsed

    def updates_left(self) -> int:
        """How many updates are likely to follow before the last one."""
        left = self.budget - self.reserve - (self.elapsed or 0.0)
        return round(left / self.update_seconds) if self.update_seconds else RECENT

    def left(self) -> float:
        """Seconds until the end of the budget."""
        return self.budget - self.reading()[0]

    def add_update(self, seconds: float, cpu_seconds: float) -> None:
        """Note how long an update took, and for how much of it a core has worked on it."""
        self._recent.append(seconds)
        self._slowdowns.append(min(MAX_SLOWDOWN, max(1.0, seconds / cpu_seconds if cpu_seconds else 1.0)))

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """Within this context happens what will happen after the last update, too: so long will that take."""
        began = time.monotonic()
        yield
        if self._recent:
            self._measured[name] = (time.monotonic() - began) / median(self._recent)

    def _needed(self, update_seconds: float) -> float:
        """Seconds for what follows the last update, where an update takes `update_seconds`."""
        call = 1 / (3 * self.images_per_update)
        costs = {name: calls * call for name, calls in self.calls.items()} | self._measured
        calibration = costs.pop("calibration", 0.0) * update_seconds
        minimum = calibration * MIN_CALIBRATION_IMAGES / MAX_CALIBRATION_IMAGES
        share = CALIBRATION_SHARE * self.budget
        optional = min(share, calibration) if minimum <= share else 0.0
        return MARGIN * sum(costs.values()) * update_seconds + optional + self._finishing()

    def _finishing(self) -> float:
        return self.finishing * (median(self._slowdowns) if self._slowdowns else 1.0)

    def calibration_images(self, T: int, processes: int) -> int:
        """How many images the time that is left is enough to calibrate on, at T network calls each."""
        update_seconds = self.reading()[1]
        per_image = T * update_seconds / (3 * self.images_per_update * processes)
        if "previews" in self._measured and self.calls.get("previews"):
            per_image = T / processes * self._measured["previews"] * update_seconds / self.calls["previews"]
        left = self.left() - self._finishing()
        affordable = math.floor(left / (MARGIN * per_image)) if per_image else 0
        return min(MAX_CALIBRATION_IMAGES, affordable) if affordable >= MIN_CALIBRATION_IMAGES else 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {
            "budget": self.budget,
            "elapsed": time.monotonic() - self.started,
            "fraction": self.fraction,
            "first_update": self.first_update,
        }


def make_clock(config: TrainConfig, started: float, processes: int, progress: Mapping[str, Any]) -> Clock | None:
    """The clock of a run, or None without a time budget.

    A resumed run has the time that its checkpoint has left over. Where a finished one gets more time, the learning rate
    begins anew.

    Args:
        started: when the command began, on the clock of `time.monotonic`.
        progress: of the checkpoint to resume from, or empty.
    """
    budget = config.budget_seconds
    if budget is None:
        return None
    share = 1 / processes
    calls = {
        "previews": config.eval_batch_size * int(config.ddpm_num_inference_steps or 0) * share,
        "calibration": MAX_CALIBRATION_IMAGES * config.ddpm_num_steps * share,
    }
    if config.calibration_images is not None:
        calls["calibration"] = config.calibration_images * config.ddpm_num_steps * share
    if config.eval_steps is not None:
        calls["validation"] = config.eval_images * (EVAL_CALLS + EVAL_SAMPLING_STEPS) * share
        calls["choosing"] = max(LOSSES, config.eval_images) * len(config.ema_widths or ()) * share
    images = config.batch_size * config.gradient_accumulation_steps
    clock = Clock(budget, started, calls, images, FINISHING + (LAUNCHER_FINISHING if processes > 1 else 0))
    if progress:
        _resume(clock, config, progress)
    return clock


def _resume(clock: Clock, config: TrainConfig, progress: Mapping[str, Any]) -> None:
    step, seconds = progress["step"], progress["seconds"]
    unknown = {"budget": seconds, "elapsed": seconds, "fraction": 1.0, "first_update": 0}
    saved = progress.get("clock") or unknown  # of a run that had all the time in the world
    is_same = progress["config"].get("time_budget") == config.time_budget
    clock.fraction, clock.first_update = saved["fraction"], saved["first_update"]
    clock.started -= saved["elapsed"]
    if is_same and (clock.fraction < 1 or not config.adds_time):
        clock.budget = saved["budget"]
        return
    if config.adds_time:
        clock.budget += saved["elapsed"]
    if clock.fraction == 1 and clock.budget > saved["elapsed"]:  # a warm restart
        clock.fraction, clock.first_update = 0.0, step


@dataclass(frozen=True)
class TimedPlan(Plan):
    """The plan of a run with a time budget, as it stands at the beginning of an update.

    Args:
        before: the fraction of the training time at the beginning of the last update but this one.
        fraction: that at the beginning of this update.
        first_update: where the learning rate began.
        updates: of the whole run: an estimate until the last update begins.
    """

    before: float = 0.0
    fraction: float = 0.0
    first_update: int = 0
    updates: int = 0

    def starting(self, clock: Clock) -> TimedPlan:
        """The plan before the first update of this run, if any is left."""
        updates = self.steps_before + (0 if clock.fraction == 1 else RECENT)
        fraction, first_update = clock.fraction, clock.first_update
        return replace(self, before=fraction, fraction=fraction, first_update=first_update, updates=updates)

    def at(self, clock: Clock, step: int) -> TimedPlan:
        """The plan at the beginning of update `step` (from 0)."""
        updates = step + 1 if clock.fraction == 1 else step + max(2, clock.updates_left())
        return replace(
            self, before=self.fraction, fraction=clock.fraction, first_update=clock.first_update, updates=updates
        )

    @property
    def max_steps(self) -> int:
        """Updates of the whole run, as far as is known by now."""
        return self.updates

    def describe(self, source: str, num_parameters: int, device: torch.device) -> str:
        """The run in a sentence."""
        sentence = super().describe(source, num_parameters, device)
        return sentence.replace(f"{self.max_steps:,} updates of", f"updates for {self.config.time_budget} of")

    def describe_validation(self) -> str:
        """The rhythm and the images; which part of the time that takes is only known later."""
        return super().describe_validation().partition(", for ")[0]

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step`: a warm-up by updates, and the schedule of diffusers by the time."""
        done, needed = step - self.first_update, self.config.lr_warmup_steps
        warmup = done / needed if done < needed else 1.0
        decay = _decay(self.config.lr_scheduler)(round(self.fraction * TICKS))
        return self.config.learning_rate * warmup * decay

    def checkpoint_due(self, done: int) -> bool:
        """Whether a checkpoint follows this update: every ten minutes, at least four times, and at the end."""
        count = max(MIN_CHECKPOINTS, round((self.config.budget_seconds or 0.0) / SECONDS_PER_CHECKPOINT))
        return done == self.max_steps or math.floor(count * self.before) < math.floor(count * self.fraction)

    def export_due(self, done: int) -> bool:
        """Whether the pipeline is written into the output folder after this update: with every checkpoint."""
        return self.checkpoint_due(done)

    def checkpoints_at_a_time(self, existing: int) -> int:
        """The most checkpoints that are on the disk at a time, where this run begins with `existing` ones."""
        limit = self.config.checkpoints_total_limit or KEPT_CHECKPOINTS
        return max(existing, limit) + 1 + (self.config.eval_steps is not None)


@lru_cache(maxsize=1)
def _decay(name: str) -> Any:
    """A schedule of diffusers without its warm-up: the learning rate relative to its peak, of 0 … TICKS."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=TICKS).lr_lambdas[0]
