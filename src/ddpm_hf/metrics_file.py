"""`metrics.json`: the figures of a model, each beside all that it depends on; and the same for the model's card."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from .run_folder import write_whole

TITLES = {
    "bpd": "bits/dim",
    "fid": "FID",
    "kid": "KID",
    "isc": "Inception Score",
    "fd": "Fréchet distance",
    "kd": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "nearest": "nearer than 95 % of held-out images",
}


class MetricsFile:
    """The figures of one model, in the order in which they were measured, as JSON objects.

    Each has `metric`, `value`, what is known of its error, `num_images`, `warnings`, and `settings`: all that it depends
    on, by which a later run knows what it need not measure again.

    Args:
        path: of the file; what is there of other weights is dropped when the file is next written.
        weights: the hash of the model's weights.

    Raises:
        ValueError: for a file that is none of ours.
    """

    def __init__(self, path: Path, weights: str) -> None:
        self.path = path
        try:
            stored = json.loads(path.read_text("utf-8"))["figures"] if path.is_file() else []
            self.figures: list[dict[str, Any]] = [f for f in stored if f["settings"]["model"]["weights"] == weights]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{str(path)!r} was not written by `ddpm-hf evaluate`, or is damaged ({error!r}): move it away."
            ) from error

    def find(self, metric: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The figure of just these settings, if it is there."""
        wanted = json.loads(json.dumps(settings))  # tuples are lists there
        return next((f for f in self.figures if f["metric"] == metric and f["settings"] == wanted), None)

    def add(self, figure: dict[str, Any]) -> None:
        """Add a figure in place of that of the same metric, data, steps and extractor; the file is whole at any time."""
        self.figures = [f for f in self.figures if _place(f) != _place(figure)] + [figure]
        content = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "figures": self.figures}
        write_whole(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _place(figure: dict[str, Any]) -> list[Any]:
    settings = figure["settings"]
    data, chain = settings["data"], settings["chain"]
    return [figure["metric"], data["name"], data["split"], chain["steps"], settings.get("extractor")]


def eval_result(figure: dict[str, Any]) -> EvalResult:
    """A figure as the `model-index` of a card has it."""
    settings = figure["settings"]
    data, chain = settings["data"], settings["chain"]
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=data["hub_id"] or data["name"],
        dataset_name=data["name"],
        dataset_split=data["split"],
        metric_type=figure["metric"],
        metric_value=float(f"{figure['value']:.4g}"),
        metric_name=f"{TITLES[figure['metric']]}, K = {chain['steps']}",
        metric_args=describe(figure),
    )


def describe(figure: dict[str, Any]) -> dict[str, Any]:
    """What stands beside a figure: its error, how many images, and how they were made."""
    settings = figure["settings"]
    chain = settings["chain"]
    said = {
        "standard error": figure.get("standard_error") and float(f"{figure['standard_error']:.2g}"),
        "images": figure["num_images"],
        "real images": figure.get("num_reference"),
        "extractor": settings.get("extractor"),
        **{name.replace("_", " "): chain.get(name) for name in ("timesteps", "eta", "solver_order", "variance_type")},
        "guidance scale": chain.get("guidance_scale"),
        "seed": settings["seed"],
    }
    return {name: value for name, value in said.items() if value is not None}
