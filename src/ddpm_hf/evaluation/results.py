"""`metrics.json`: the figures of a model, each beside all that it depends on; and the same for the model's card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..diffusion.ddpm_repository import EVALUATION_FILES
from ..storage.files import write_text_atomically
from ..storage.weights import values_digest

TITLES = {
    "bpd": "bits/dim",
    "fid": "FID",
    "kid": "KID",
    "isc": "Inception Score",
    "fd": "Fréchet distance",
    "kd": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "nearest": "share near training images (0.05 for new ones)",
}


class MetricsFile:
    """The figures of one model, in the order in which they were measured, as JSON objects.

    Each has `metric`, `value`, what is known of its error, `num_images`, `warnings`, and `settings`: all that it
    depends on, by which a later run knows what it need not measure again.

    Args:
        path: of the file; what is there of other weights is dropped when the file is next written.
        weights: the hash of the model's weights as they are stored.

    Raises:
        ValueError: for a file that is none of ours.
    """

    def __init__(self, path: Path, weights: str) -> None:
        self.path, self.weights = path, weights
        try:
            stored = json.loads(path.read_text("utf-8"))["figures"] if path.is_file() else []
            self.figures: list[dict[str, Any]] = [f for f in stored if f["settings"]["chain"]["weights"] == weights]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{str(path)!r} was not written by `ddpm-hf evaluate`, or is damaged ({error!r}): move it away."
            ) from error

    def find(self, metric: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The figure of just these settings, if it is there."""
        wanted = json.loads(json.dumps(settings))  # tuples are lists there
        return next((f for f in self.figures if f["metric"] == metric and f["settings"] == wanted), None)

    def add(self, figure: dict[str, Any]) -> None:
        """Add a figure, in place of that of the same data and title. The file is always whole."""
        self.figures = [f for f in self.figures if _place(f) != _place(figure)] + [figure]
        content = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "figures": self.figures}
        write_text_atomically(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _place(figure: dict[str, Any]) -> tuple[str, str, str]:
    data = figure["settings"]["data"]
    return data["name"], data["split"], title(figure)


def eval_result(figure: dict[str, Any]) -> EvalResult:
    """A figure as the `model-index` of a card has it."""
    data = figure["settings"]["data"]
    return EvalResult(
        task_type="unconditional-image-generation",
        dataset_type=data["hub_id"] or data["name"],
        dataset_name=data["name"],
        dataset_split=data["split"],
        metric_type=figure["metric"],
        metric_value=float(f"{figure['value']:.4g}"),
        metric_name=title(figure),
        metric_args=circumstances(figure),
    )


def title(figure: dict[str, Any]) -> str:
    """What a figure is called: its metric, and all in which figures differ that stand side by side."""
    settings, chain = figure["settings"], figure["settings"]["chain"]
    K, calls, extractor = chain["num_inference_steps"], settings.get("calls_per_image"), settings.get("extractor")
    eta, order, guidance = chain.get("eta"), chain.get("solver_order", 1), chain.get("guidance_scale", 1)
    said = {
        TITLES[figure["metric"]]: True,
        f"K = {K}": True,
        chain["timesteps"]: chain["num_train_timesteps"] > K,
        f"η = {eta}": eta not in (None, 1),
        f"order {order}": order != 1,
        f"σ² {chain.get('variance_type')}": "variance_type" in chain,
        f"guidance {guidance}": guidance != 1,
        f"N = {settings['num_images']:,}": True,
        f"{calls} calls per image": calls is not None,
        f"{chain['dtype']}": chain["dtype"] != "float32",
        f"held out {settings.get('held_out', {}).get('split')}": "held_out" in settings,
        _short_name(extractor or ""): extractor is not None,
    }
    return ", ".join(words for words, is_said in said.items() if is_said)


def _short_name(extractor: str) -> str:
    """The network's name, and a hash of all that its features depend on."""
    return f"{extractor.split(',')[0]} [{hashlib.sha256(extractor.encode()).hexdigest()[:6]}]"


def circumstances(figure: dict[str, Any]) -> dict[str, Any]:
    """What stands beside a figure: its error, how many images, how they were made, and by what."""
    settings, chain = figure["settings"], figure["settings"]["chain"]
    names = ("timesteps", "eta", "solver_order", "variance_type", "guidance_scale", "seed", "dtype")
    packages = ("ddpm-hf", "diffusers", "torch")
    interval = [_short(figure[name]) for name in ("low", "high") if name in figure]
    said = {
        "standard_error": _short(figure.get("standard_error")),
        "95 % interval": interval or None,
        "std": _short(figure.get("std")),
        "images": figure["num_images"],
        "real_images": figure.get("num_reference"),
        **{name: chain.get(name) for name in names},
        "calls_per_image": settings.get("calls_per_image"),
        "ema": figure.get("ema"),
        "extractor": settings.get("extractor"),
        **{package: chain.get(package) for package in packages},
        "notes": "; ".join(figure["warnings"]) or None,
    }
    return {name: value for name, value in said.items() if value is not None}


def markdown_table(figures: Sequence[dict[str, Any]]) -> str:
    """The figures for people, with the warnings that stand beside them as numbered notes."""
    notes = list(dict.fromkeys(warning for figure in figures for warning in figure["warnings"]))
    rows = ["| data | metric | value | error | notes |", "|---|---|---:|---:|---|"]
    for figure in figures:
        data = figure["settings"]["data"]
        numbers = ", ".join(str(notes.index(warning) + 1) for warning in figure["warnings"])
        rows.append(
            f"| {data['name']}, {data['split']} | {title(figure)} | {figure['value']:.4g} | {_error(figure)} "
            f"| {numbers} |"
        )
    return "\n".join([*rows, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def _error(figure: dict[str, Any]) -> str:
    if "standard_error" in figure:
        return f"± {figure['standard_error']:.2g}"
    return f"{figure['low']:.4g} to {figure['high']:.4g}" if "low" in figure else ""


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def evaluation_files(folder: Path) -> list[str]:
    """The files that evaluations of the very weights in a folder have left there, `metrics.json` first.

    Training on leaves those of the earlier weights, and an evaluation of some metrics the pictures of the others.
    """
    try:
        figures = json.loads((folder / "metrics.json").read_text("utf-8"))["figures"]
        measured = {figure["settings"]["chain"]["weights"] for figure in figures}
        names = {"metrics.json"}.union(*(_files_of(figure) for figure in figures))
    except (OSError, ValueError, TypeError, KeyError):  # never evaluated, or somebody's own file
        return []
    if measured != {values_digest(folder)}:
        return []
    return [name for name in EVALUATION_FILES if name in names and (folder / name).is_file()]


def _files_of(figure: dict[str, Any]) -> list[str]:
    """What is written beside a figure."""
    settings = figure["settings"]
    if figure["metric"] == "nearest":
        return ["nearest_features.png" if settings.get("extractor") else "nearest.png"]
    if figure["metric"] == "bpd":
        curve = [] if settings.get("calls_per_image") else ["rate_distortion.png"]  # an estimate leaves timesteps out
        return ["likelihood.json", "bits_per_dim.png", *curve]
    return []
