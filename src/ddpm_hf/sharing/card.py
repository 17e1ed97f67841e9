"""The model card: what is known of a model, filled into `model_card.md`; what a person has edited is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Template
from torch.utils.flop_counter import FlopCounterMode

from ..diffusion.ddpm_labels import label_names
from ..diffusion.pipeline import image_size
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..evaluation.calibration import recommended_steps, steps_table
from ..evaluation.results import evaluation_files
from ..storage.files import write_text_atomically
from ..storage.weights import hash_weight_files
from .card_merge import merge_cards, parse_card, stamp

PICTURES = ("samples.png", "real.png", "loss.png")
EXAMPLE_STEPS = 100
SHOWN_NAMES = 20  # of classes

# Options about local files, the Hub, logging and the machine, which do not describe the model.
PRIVATE_OPTION = re.compile(
    r".*(_dir|_path|token|logg|checkpoint).*|hub_.*|push_.*|overwrite_.*|config|unet|dataset_name|local_rank|dry_run"
    r"|dataloader_num_workers|cache_limit_gb"
)
PRIVATE_VALUE = re.compile(r"(^|[\s=:'\"\[(,])(/|~|[A-Za-z]:\\|\.\.?/)|hf_\w{8,}")


@dataclass(frozen=True)
class CardFacts:
    """What is known of a model that its files do not show. Fields that are None or empty are left out of the card.

    Args:
        repo_id: the model's name on the Hub, "owner/name".
        license: an identifier of the Hub's list, e.g. "apache-2.0".
        dataset: the training data in words, e.g. "`digits`, 1,797 images".
        dataset_ids: the training data as ids of the Hub.
        base_model: the id on the Hub of the model that this one was converted from.
        options: the training configuration. Folders, tokens and repositories are left out of the card.
        updates: optimizer updates.
        images_seen: updates times images per update, over all processes.
        seconds: wall-clock time of training.
        hardware: e.g. "1 × NVIDIA H200".
        copies: how many samples copy a training image, in words.
        demo: the name on the Hub of a Space that shows the model.
        results: what was measured, which becomes the `model-index` of the metadata.
    """

    repo_id: str | None = None
    license: str | None = None
    dataset: str | None = None
    dataset_ids: Sequence[str] = ()
    base_model: str | None = None
    options: Mapping[str, Any] | None = None
    updates: int | None = None
    images_seen: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    copies: str | None = None
    demo: str | None = None
    results: Sequence[EvalResult] = ()


FACT_TYPES: dict[str, Any] = {
    "repo_id": str, "license": str, "dataset": str, "dataset_ids": list, "base_model": str, "options": dict,
    "updates": int, "images_seen": int, "seconds": (int, float), "hardware": str, "copies": str, "demo": str,
    "results": list,
}  # fmt: skip


def write_card(folder: Path, facts: CardFacts | Mapping[str, Any] | None = None) -> Path:
    """Write the README.md of a saved pipeline, or update the existing one.

    Sections and metadata that a person has changed, added or removed stay as they are. Facts that an earlier call has
    recorded for the same weights are kept.

    Returns:
        The card's path.

    Raises:
        ValueError: where the existing card is not UTF-8, its metadata not a YAML mapping, or its `model-index` not a
            list. It is left unchanged.
    """
    file = folder / "README.md"
    facts = facts if isinstance(facts, CardFacts) else CardFacts(**(facts or {}))
    write_text_atomically(file, update_card(read_card(folder), folder, facts))
    return file


def read_card(folder: Path) -> str | None:
    """The text of the README.md of a folder, if it has one. Raises a ValueError where it is not UTF-8."""
    file = folder / "README.md"
    try:
        return file.read_text("utf-8-sig") if file.is_file() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file)!r} is not UTF-8 text: fix or remove it.") from error


def update_card(existing: str | None, folder: Path, facts: CardFacts) -> str:
    """The text of the card of the pipeline in `folder`, made from the existing one and from `facts`."""
    weights = hash_weight_files(folder)
    known = known_facts(existing, weights) if existing is not None else CardFacts()
    facts = combine_facts(known, replace(facts, options=_public_options(facts.options)))
    new = stamp(render_card(folder, facts), {"facts": asdict(facts), "weights": weights})
    return merge_cards(existing, new) if existing is not None else new


def known_facts(card: str, weights: str) -> CardFacts:
    """The facts recorded in a card: all of them if it describes these weights, else only its name on the Hub."""
    record = parse_card(card).record
    names = {f.name for f in fields(CardFacts)} if record.get("weights") == weights else {"repo_id"}
    known = {k: v for k, v in record.get("facts", {}).items() if k in names and isinstance(v, FACT_TYPES[k])}
    try:
        return CardFacts(**{**known, "results": [EvalResult(**r) for r in known.get("results", ())]})
    except (TypeError, ValueError, AttributeError):  # a record that somebody has edited
        return CardFacts()


def combine_facts(known: CardFacts, facts: CardFacts) -> CardFacts:
    """`facts`, completed by those that are `known`; a result replaces that of the same name and data."""
    together = {f.name: value for f in fields(facts) if (value := getattr(facts, f.name))}
    new = {_place(result) for result in facts.results}
    kept = [result for result in known.results if _place(result) not in new]
    return replace(known, **together | {"results": [*kept, *facts.results]})


def _place(result: EvalResult) -> tuple[object, ...]:
    """What identifies a result: a result with the same identity replaces it."""
    return result.unique_identifier, result.metric_type, result.metric_name


def render_card(folder: Path, facts: CardFacts) -> str:
    """The text of a new card for the pipeline in `folder`."""
    model, scheduler = describe_model(folder), folder / "scheduler" / "scheduler_config.json"
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=facts.license,
        tags=["ddpm", "ddpm-hf", *(["class-conditional"] if model["classes"] else [])],
        datasets=list(facts.dataset_ids) or None,
        base_model=facts.base_model,
        eval_results=list(facts.results) or None,
        model_name=(facts.repo_id or folder.absolute().name).split("/")[-1] if facts.results else None,
    )
    trained_here = bool((facts.options or {}).get("label_column"))  # with a null label, by versions that kept no names
    names = model["label_names"]
    steps = [k for k in (10, 25, 50, 100, 250) if k < model["T"]] + [model["T"]]
    return _template().render(
        card_data=metadata.to_yaml(),
        facts=facts,
        model=model,
        classes=len(names) or (model["classes"] or 0) - trained_here,
        label_names=[_cell(name) for name in names[:SHOWN_NAMES]],
        title=facts.repo_id.split("/")[-1] if facts.repo_id else "DDPM",
        location=facts.repo_id or ".",
        pictures=[*(name for name in PICTURES if (folder / name).is_file()), *evaluation_files(folder)],
        example_steps=min(EXAMPLE_STEPS, model["T"]),
        labels=f", class_labels={_example_label(names)}" if model["classes"] else "",
        few_steps=min(25, model["T"]),
        few=_few_steps(scheduler.read_text("utf-8")) if model["calibrated"] else None,
        costs=[(k, _three_digits(k * model["flop"] / 1e9)) for k in steps] if model["flop"] else [],
        training=_training_rows(facts),
        options=[(name, _cell(f"`{value}`")) for name, value in (facts.options or {}).items()],
        dataset=_line(facts.dataset or ""),
        results=[_result_row(result) for result in facts.results],
    )


def describe_model(folder: Path) -> dict[str, Any]:
    """What the configurations of a saved pipeline show, and what its network costs."""
    unet = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    size = unet.get("sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    parameters, flop = network_cost(json.dumps(unet))
    return {
        "height": height,
        "width": width,
        "channels": unet["in_channels"],
        "classes": unet.get("num_class_embeds"),
        "label_names": label_names(unet),
        "parameters": parameters,
        "flop": flop,
        "T": scheduler.get("num_train_timesteps") or 1000,
        "beta_schedule": scheduler.get("beta_schedule"),
        "prediction_type": scheduler.get("prediction_type"),
        "variance_type": scheduler.get("variance_type"),
        "calibrated": bool(scheduler.get("_calibration")),
    }


@lru_cache(maxsize=4)  # a run saves the same network at every checkpoint
def network_cost(unet_config: str) -> tuple[int, int | None]:
    """Parameters, and floating point operations per image and forward pass, of the network of a JSON configuration.

    The operations are None for a network without a usable `sample_size`.
    """
    with torch.device("meta"):  # shapes without numbers: nothing is computed
        unet = UNet2DModel.from_config(json.loads(unet_config))
    label = torch.zeros(1, dtype=torch.long, device="meta")
    try:
        x = torch.empty(1, unet.config.in_channels, *image_size(unet), device="meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(x, label, class_labels=label if unet.config.num_class_embeds else None)
    except (RuntimeError, ValueError):  # no size, or one that the network can't halve
        return unet.num_parameters(), None
    return unet.num_parameters(), counter.get_total_flops()


@lru_cache(maxsize=4)  # several seconds, at every save of a calibrated model
def _few_steps(scheduler_config: str) -> tuple[str, int] | None:
    """From the calibration: a table of costs by the number of steps, and how many steps are enough."""
    try:
        scheduler = DDPMSchedulerCustom.from_config(json.loads(scheduler_config))
        return steps_table(scheduler), recommended_steps(scheduler)
    except (ValueError, KeyError, TypeError):  # an unusable calibration must not keep the model from being saved
        return None


@lru_cache(maxsize=1)
def _template() -> Template:
    """`model_card.md`: in the package in a wheel, at the top of the project in a checkout."""
    shipped = files("ddpm_hf") / "model_card.md"
    file = shipped if shipped.is_file() else Path(__file__).parents[3] / "model_card.md"
    return Template(file.read_text("utf-8"))


def _training_rows(facts: CardFacts) -> list[tuple[str, str]]:
    rows = {
        "Data": facts.dataset,
        "Optimizer updates": f"{facts.updates:,}" if facts.updates is not None else None,
        "Images seen": f"{facts.images_seen:,}" if facts.images_seen is not None else None,
        "Wall-clock time": str(timedelta(seconds=round(facts.seconds))) if facts.seconds is not None else None,
        "Hardware": facts.hardware,
        "Copies": facts.copies,
    }
    return [(name, _cell(value)) for name, value in rows.items() if value is not None]


def _result_row(result: EvalResult) -> tuple[str, ...]:
    """Data, metric, value, and how it was measured."""
    data = f"{result.dataset_name}, {result.dataset_split}" if result.dataset_split else result.dataset_name
    how = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in (result.metric_args or {}).items())
    return tuple(map(_cell, (data, result.metric_name or result.metric_type, str(result.metric_value), how)))


def _public_options(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The options that describe the model, without local paths and secrets."""
    if options is None:
        return None
    shown = {k: v for k, v in options.items() if v is not None and not PRIVATE_OPTION.fullmatch(k)}
    return {k: v for k, v in shown.items() if not PRIVATE_VALUE.search(str(v))}


def _example_label(names: Sequence[str]) -> str:
    """A label as code: a name, unless it holds what would need care in a card."""
    return f'"{names[0]}"' if names and re.fullmatch(r"[\w ,.+-]{1,60}", names[0]) else "0"


def _line(value: str) -> str:
    """Text as one line without HTML tags."""
    return " ".join(value.replace("<", "&lt;").split())


def _cell(value: str) -> str:
    """Text as one cell of a Markdown table."""
    return _line(value).replace("|", "\\|")


def _three_digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def is_average(model: Path) -> bool | None:
    """Whether the weights of a saved pipeline are an average (EMA), by its own card; None where that is unknown.

    Raises:
        ValueError: for a card that can't be read.
    """
    card = read_card(model) if (model / "model_index.json").is_file() else None
    options = None if card is None else known_facts(card, hash_weight_files(model)).options
    return None if options is None else options.get("use_ema")
