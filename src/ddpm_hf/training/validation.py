"""How good the model is during training, measured by all processes together, and which checkpoint is the best."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ..evaluation.likelihood import bits_per_dim
from ..evaluation.metrics.distances import frechet_distance, moments
from ..evaluation.metrics.patch_features import PatchFeatures
from ..progress import progress, write
from ..sampling.generate import sample_in_lockstep
from ..storage.checkpoint import BEST, checkpoint_steps
from ..storage.files import read_json, write_text_atomically
from .copies import TrainingImages
from .log import TrainingLog
from .network import ema_weights
from .output_folder import BITS
from .plan import EVAL_CALLS, EVAL_SAMPLING_STEPS
from .plots import save_validation_curves
from .state import Run
from .validation_set import ValidationSet

METRICS = {"bits_per_dim": "bits/dim", "frechet": "the Fréchet distance"}
SIGNIFICANT = 2.0  # standard errors
LEAST_GAIN = 1e-3  # relative to the best value: less is not worth training for


class Validation:
    """Measures a run on held-out images.

    Noise, timesteps and seeds are the same each time, so that two values of a run differ by the weights alone, and
    much less by chance than their standard errors suggest.
    """

    def __init__(
        self,
        run: Run,
        log: TrainingLog,
        validation_set: ValidationSet,
        training_images: TrainingImages | None = None,
    ) -> None:
        self.run, self.log, self.validation_set, self.training_images = run, log, validation_set, training_images
        self.features = PatchFeatures(validation_set.pixels)
        self.real = moments(self.features(validation_set.pixels))
        self.best: dict[str, Any] | None = None  # the entry of the log, in the main process
        self.of_seen = frechet_distance(moments(self.features(validation_set.seen)), self.real)
        self.bits = self._read_bits()  # by update: of the best and of the latest weights, (n,) of the held-out images
        self.copies_of_held_out = self._copies("eval_copies_of_held_out", validation_set.pixels)

    def measure(self, check: Callable[[], None]) -> bool:
        """Measure the weights that would be exported and log it, unless it has been measured already.

        All processes must call it.

        Args:
            check: is called before every network call, equally often by all processes, and may raise.

        Returns:
            Whether they are the best so far, the same in all processes.
        """
        run, log = self.run, self.log
        if not run.agreement.largest(int(any(entry["step"] == run.step for entry in log.validations()))):
            began = time.perf_counter()
            values = self._measure(check)
            log.write_validation(run.step, values)
            if run.accelerator.is_main_process:
                write(f"Update {run.step:,}: {_in_words(values)}, in {time.perf_counter() - began:.1f} s.")
        self.best = self._find_best()
        return bool(run.agreement.largest(int(self.best is not None and self.best["step"] == run.step)))

    def _measure(self, check: Callable[[], None]) -> dict[str, float]:
        """bits/dim with its standard error, and the Fréchet distances of samples and of training images."""
        run, images, labels = self.run, self.validation_set.pixels, self.validation_set.labels
        pipeline = run.pipeline()
        batches = math.ceil(math.ceil(len(images) / run.plan.num_processes) / run.plan.inference_batch)
        calls, T = min(EVAL_CALLS, run.config.ddpm_num_steps), run.config.ddpm_num_steps
        with (
            progress(
                total=batches * (calls + min(EVAL_SAMPLING_STEPS, T)),
                desc="Validation",
                unit="call",
                leave=False,
                is_shown=run.accelerator.is_main_process,
            ) as bar,
            ema_weights(run.ema, run.unet),
            _before_each_call(run.network, check, bar.update),
        ):
            bits = bits_per_dim(
                pipeline,
                images,
                calls_per_image=calls if calls < T else None,
                seed=run.config.seed,
                batch_size=run.plan.inference_batch,
                class_labels=labels,
                show_progress=False,
            )
            samples = sample_in_lockstep(  # one for each held-out image, with its label
                pipeline,
                len(images),
                run.config.seed,
                run.plan.inference_batch,
                class_labels=None if labels is None else labels.tolist(),
                num_inference_steps=min(EVAL_SAMPLING_STEPS, T),
                timesteps="linspace",
                eta=0.0,
                solver_order=2,
            )
        if bits.of_images is not None:
            self.bits[run.step] = bits.of_images.tolist()
        return {
            "eval_bits_per_dim": bits.total,
            "eval_bits_per_dim_se": bits.standard_error,
            "eval_frechet": frechet_distance(moments(self.features(samples)), self.real),
            "eval_frechet_of_training_images": self.of_seen,
            **self._copies("eval_copies", samples),
            **self.copies_of_held_out,
        }

    def _copies(self, name: str, pixels: Tensor) -> dict[str, float]:
        """The share of these images that copy a training image, by this name; nothing for a large training set."""
        known = self.training_images
        return {} if known is None else {name: known.nearest(pixels.cpu()).number / len(pixels)}

    def has_stalled(self) -> bool:
        """Whether as many validations as `early_stopping_patience` were no better than the best before.

        All processes must call it, and all get the same answer; it is no, where no validation was due just now.
        """
        run, patience = self.run, self.run.config.early_stopping_patience
        if patience is None or not run.plan.validation_due(run.step):
            return False
        return bool(run.agreement.largest(int(self._since_gain() >= patience)))

    def _since_gain(self) -> int:
        """The number of validations since the last that was better by LEAST_GAIN, in the main process; 0 elsewhere."""
        metric, best, since = f"eval_{self.run.config.metric_for_best_model}", math.inf, 0
        for value in (entry.get(metric, math.inf) for entry in self.log.validations()):
            is_better = value < best * (1 - LEAST_GAIN)
            best, since = (value, 0) if is_better else (best, since + 1)
        return since if math.isfinite(best) else 0

    def explain_stop(self) -> str:
        """In the main process: why the run ends, in words."""
        run, metric = self.run, METRICS[self.run.config.metric_for_best_model]
        return (
            f"stopped early after {run.step:,} of {run.plan.max_steps:,} updates: {metric} of held-out images has not "
            f"improved by {LEAST_GAIN:.1%} for {self._since_gain()} validations."
        )

    def choose(self) -> tuple[bool, str]:
        """Whether the best checkpoint is better than the present weights beyond chance; if unknown, yes.

        Both are measured on the same held-out images with the same noise and timesteps, so that the standard error is
        that of their difference. The best of many checkpoints is partly the luckiest, and an early one has not seen
        its learning rate decay.

        All processes must call it, and all get the same answer.

        Returns:
            The answer, and a sentence on what is exported.
        """
        run, best = self.run, (self.best or {}).get("step", self.run.step)
        is_better, evidence = True, ""
        if {best, run.step} <= set(self.bits) and run.config.metric_for_best_model == "bits_per_dim":
            now, then = (torch.tensor(self.bits[step], dtype=torch.float64) for step in (run.step, best))
            gain, error = float((now - then).mean()), float((now - then).std()) / math.sqrt(len(now))
            is_better = not gain <= SIGNIFICANT * error  # NaN where the last weights are damaged
            evidence = f"{gain:.2g} ± {error:.1g} bits/dim better on the same held-out images"
        if best == run.step:
            reason = "The last weights are the best, and exported."
        elif is_better:
            reason = (
                f"The best checkpoint, of update {best:,}, is exported" + (evidence and f": it is {evidence}") + "."
            )
        else:
            reason = (
                f"The last weights are exported: those of the best checkpoint, of update {best:,}, are {evidence}, "
                "which may be chance."
            )
        return run.agreement.from_main((is_better, reason))

    def _find_best(self) -> dict[str, Any] | None:
        """In the main process: the best entry of the log whose checkpoint exists, or can be saved now."""
        if not self.run.accelerator.is_main_process:
            return None
        metric, folder = f"eval_{self.run.config.metric_for_best_model}", Path(self.run.config.output_dir)
        steps = {*checkpoint_steps(folder), self.run.step}
        entries = [e for e in self.log.validations() if metric in e and e["step"] in steps]
        return min(entries, key=lambda entry: entry[metric], default=None)

    def record_best(self) -> None:
        """Name the best checkpoint in `best_checkpoint.json`, and draw what was measured so far.

        All processes must call it, and all raise an OSError if that can't be written.
        """
        folder, metric = Path(self.run.config.output_dir), self.run.config.metric_for_best_model
        self.best = best = self._find_best()
        with self.run.agreement.together():
            if best is not None:
                kept = {str(step): self.bits[step] for step in {best["step"], self.run.step} & set(self.bits)}
                write_text_atomically(self.log.file.parent / BITS, json.dumps(kept))
                record = {"checkpoint": f"checkpoint-{best['step']}", "metric_for_best_model": metric, **best}
                write_text_atomically(folder / BEST, json.dumps(record, indent=2) + "\n")
                save_validation_curves(self.log.validations(), best["step"], folder / "validation.png")

    def _read_bits(self) -> dict[int, list[float]]:
        """Those that an earlier part of the run has left, in the main process."""
        try:
            kept = read_json(self.log.file.parent / BITS)
            return {int(step): [float(value) for value in values] for step, values in kept.items()}
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            return {}

    def describe_best(self) -> str:
        """In the main process: the best checkpoint and what was measured, in a line."""
        if self.best is None:
            return "none: no finite value was measured"
        config = self.run.config
        checkpoint = Path(config.output_dir) / f"checkpoint-{self.best['step']}"
        return f"{checkpoint} by {config.metric_for_best_model}: {_in_words(self.best)}"


def _in_words(values: dict[str, Any]) -> str:
    bits, error, distance = (
        values.get(f"eval_{name}", math.nan) for name in ("bits_per_dim", "bits_per_dim_se", "frechet")
    )
    seen = values["eval_frechet_of_training_images"]
    copies = f", {values['eval_copies']:.1%} copies" if "eval_copies" in values else ""
    return f"{bits:.3f} ± {error:.3f} bits/dim, Fréchet distance {distance:.3g} (training images: {seen:.3g}){copies}"


@contextmanager
def _before_each_call(network: Module, *actions: Callable[[], object]) -> Iterator[None]:
    """Within this context, call the actions before every call of the network."""

    def act(module: Module, inputs: object) -> None:
        for action in actions:
            action()

    hook = network.register_forward_pre_hook(act)
    try:
        yield
    finally:
        hook.remove()
