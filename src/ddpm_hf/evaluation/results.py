"""Results: measured numbers with all that they depend on; as `metrics.json`, as a table, and for the model's card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..config.options import check_types
from ..diffusion.ddpm_repository import EVALUATION_FILES
from ..storage.checkpoint import MANIFEST
from ..storage.files import check_writable, read_json, write_text_atomically
from ..storage.weights import hash_loaded_weights
from .metrics.measurement import Measurement

RESULTS_FILE = "metrics.json"
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


@dataclass(frozen=True)
class Settings:
    """All that a result depends on, in types of JSON. A result with equal settings need not be measured again.

    Args:
        data: the real images: `name`, `hub_id`, `split`, their number and hash, how files became pixels.
        chain: the hash of the stored weights, the trajectory, the scheduler, seeds, precision and versions.
        num_images: how many images or samples were requested.
        extractor: the network that features are from.
        calls_per_image: network calls, of an estimate of bits/dim.
        held_out: the real images whose distances to the training images are those of new ones.
    """

    data: dict[str, Any]
    chain: dict[str, Any]
    num_images: int
    extractor: str | None = None
    calls_per_image: int | None = None
    held_out: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Result(Measurement):
    """A measured number of a model, with all that it depends on.

    Args:
        settings: what it depends on.
        ema: whether the weights are an average (EMA); None if unknown. Not a setting: it changes no number.
    """

    settings: Settings = field(repr=False)
    ema: bool | None = None

    def __str__(self) -> str:
        return f"{self.title}: {self.numbers()}"

    @property
    def weights(self) -> str:
        """The hash of the measured weights, as they are stored."""
        return self.settings.chain["weights"]

    @property
    def title(self) -> str:
        """The metric, and whatever makes results of one data set incomparable."""
        settings, chain = self.settings, self.settings.chain
        K, eta = chain["num_inference_steps"], chain.get("eta")
        order, guidance = chain.get("solver_order", 1), chain.get("guidance_scale", 1)
        parts = {
            TITLES[self.metric]: True,
            f"K = {K}": True,
            chain["timesteps"]: chain["num_train_timesteps"] > K,
            f"η = {eta}": eta not in (None, 1),
            f"order {order}": order != 1,
            f"σ² {chain.get('variance_type')}": "variance_type" in chain,
            f"guidance {guidance}": guidance != 1,
            f"N = {settings.num_images:,}": True,
            f"{settings.calls_per_image} calls per image": settings.calls_per_image is not None,
            chain["dtype"]: chain["dtype"] != "float32",
            f"held out {(settings.held_out or {}).get('split')}": settings.held_out is not None,
            _short_name(settings.extractor or ""): settings.extractor is not None,
        }
        return ", ".join(part for part, is_shown in parts.items() if is_shown)

    @property
    def slot(self) -> tuple[str, str, str]:
        """Data, split and title: a new result replaces an earlier one in its slot."""
        return self.settings.data["name"], self.settings.data["split"], self.title

    def circumstances(self) -> dict[str, Any]:
        """What a card states beside the value: its error, the number of images, how they were made, and by what."""
        settings, chain = self.settings, self.settings.chain
        sampling = ("timesteps", "eta", "solver_order", "variance_type", "guidance_scale", "seed", "dtype")
        packages = ("ddpm-hf", "diffusers", "torch")
        known = {
            "standard_error": _short(self.standard_error),
            "95 % interval": None if self.low is None else [_short(self.low), _short(self.high)],
            "std": _short(self.std),
            "finite-sample bias": _short(self.bias),
            "images": self.num_images,
            "real_images": self.num_reference,
            **{name: chain.get(name) for name in sampling},
            "calls_per_image": settings.calls_per_image,
            "ema": self.ema,
            "extractor": settings.extractor,
            **{package: chain.get(package) for package in packages},
            "notes": "; ".join(self.warnings) or None,
        }
        return {name: value for name, value in known.items() if value is not None}

    def for_card(self) -> EvalResult:
        """The result as the `model-index` of a card has it."""
        data = self.settings.data
        return EvalResult(
            task_type="unconditional-image-generation",
            dataset_type=data["hub_id"] or data["name"],
            dataset_name=data["name"],
            dataset_split=data["split"],
            metric_type=self.metric,
            metric_value=float(f"{self.value:.4g}"),
            metric_name=self.title,
            metric_args=self.circumstances(),
        )


def _short_name(extractor: str) -> str:
    """The network's name, and a hash of all that its features depend on."""
    return f"{extractor.split(',')[0]} [{hashlib.sha256(extractor.encode()).hexdigest()[:6]}]"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


# --- on disk -------------------------------------------------------------------------------------------------------


def read_results(file: Path, weights: str | None = None) -> list[Result]:
    """The results in a `metrics.json` of this version or of 0.1.0, in the order in which they were measured.

    Args:
        weights: the hash of weights, to leave out the results of others.

    Raises:
        ValueError: for a file of another kind.
    """
    try:
        stored = read_json(file)["figures"] if file.is_file() else []
        results = [
            Result(**r | {"settings": Settings(**r["settings"]), "warnings": tuple(r["warnings"])}) for r in stored
        ]
        for result in results:
            _check_sound(result)
        return [result for result in results if weights in (None, result.weights)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{str(file)!r} was not written by `ddpm-hf evaluate`, or is damaged ({error!r}): move it away."
        ) from error


def _check_sound(result: Result) -> None:
    """Raise unless a result that was read can be shown and written again."""
    check_types(result.settings)
    check_types(result)
    str(result), result.slot, result.for_card()


def write_results(file: Path, results: Sequence[Result]) -> None:
    """Write `metrics.json` atomically."""
    figures = [_without_none(asdict(result)) for result in results]
    content = {"written": datetime.now(UTC).isoformat(timespec="seconds"), "figures": figures}
    write_text_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _without_none(result: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in result["settings"].items() if value is not None}
    return {name: value for name, value in (result | {"settings": settings}).items() if value is not None}


def choose_output_dir(model: str, output_dir: str | None) -> Path:
    """The folder for what is measured of a model: its own, unless `output_dir` names another one.

    Raises:
        ValueError: for a model that has no folder of its own to which files may be added, for a folder with another
            model, and for one that can't be written to.
    """
    place = Path(model if output_dir is None else output_dir)
    holds_model, is_own = (place / "model_index.json").is_file(), place.resolve() == Path(model).resolve()
    if holds_model and not is_own:
        raise ValueError(f"`output_dir` {str(output_dir)!r} holds another model: choose another --output_dir.")
    if (output_dir is None and not holds_model) or (is_own and (place / MANIFEST).is_file()):
        raise ValueError(
            f"nothing can be added to {model!r}: it is not a saved pipeline on this machine, or it is a training "
            "checkpoint, which must not change. Pass --output_dir FOLDER."
        )
    check_writable(place)
    return place


def files_of(metric: str, settings: Settings) -> list[str]:
    """The files that are written beside `metrics.json` when a metric is measured."""
    if metric == "nearest":
        return ["nearest_features.png" if settings.extractor else "nearest.png"]
    if metric == "bpd":
        curve = [] if settings.calls_per_image else ["rate_distortion.png"]  # an estimate leaves timesteps out
        return ["likelihood.json", "bits_per_dim.png", *curve]
    return []


def evaluation_files(folder: Path) -> list[str]:
    """The files from evaluations of the very weights in a folder, `metrics.json` first.

    Not those of earlier weights, which training leaves behind, and no plot that belongs to none of the results.
    """
    try:
        results = read_results(folder / RESULTS_FILE)
        if not results or {result.weights for result in results} != {hash_loaded_weights(folder)}:
            return []
    except (OSError, ValueError):  # a file of the user's own
        return []
    names = {RESULTS_FILE}.union(*(files_of(result.metric, result.settings) for result in results))
    return [name for name in EVALUATION_FILES if name in names and (folder / name).is_file()]


# --- for people ----------------------------------------------------------------------------------------------------


def markdown_table(results: Sequence[Result]) -> str:
    """The results as a table, with their warnings as numbered notes below it."""
    notes = list(dict.fromkeys(warning for result in results for warning in result.warnings))
    rows = ["| data | metric | value | error | notes |", "|---|---|---:|---:|---|"]
    for result in results:
        numbers = ", ".join(str(notes.index(warning) + 1) for warning in result.warnings)
        data, split, title = result.slot
        rows.append(f"| {data}, {split} | {title} | {result.value:.4g} | {_error(result)} | {numbers} |")
    return "\n".join([*rows, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def _error(result: Result) -> str:
    if result.standard_error is not None:
        return f"± {result.standard_error:.2g}"
    return "" if result.low is None else f"{result.low:.4g} to {result.high:.4g}"
