"""The files of a model: complete, intact, in safetensors, and of the network that the configuration describes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors import SafetensorError, safe_open

from ..storage.checkpoint import MANIFEST, check_intact, latest_checkpoint
from .finding import Finding, Repair

WEIGHTS = "diffusion_pytorch_model"
NETWORK = "UNet2DModel"
PIPELINES = (
    "DDPMPipeline",
    "DDIMPipeline",
    "PNDMPipeline",
    "ScoreSdeVePipeline",
    "KarrasVePipeline",
    "DDPMPipelineCustom",
)
AGAIN = "Download or save the model again."


def model_folder(folder: Path) -> Path:
    """The folder of the pipeline itself: of a run without one, that of its newest intact checkpoint."""
    if not (folder / "model_index.json").is_file():
        checkpoint, _ = latest_checkpoint(folder)
        return checkpoint or folder
    return folder


def examine_files(folder: Path) -> Iterator[Finding]:
    """Faults of the files in a pipeline's folder."""
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
        yield from _examine_json(folder, name)
    yield from _examine_classes(folder)
    if (folder / MANIFEST).is_file():
        try:
            check_intact(folder)
        except ValueError as error:
            yield Finding(
                "hashes", "A file of the checkpoint is not as it was written.", str(error),
                "The model is not the one that was trained.", _another(folder, AGAIN),
            )  # fmt: skip
    unet = folder / "unet"
    if not unet.is_dir():
        return
    shards = sorted(unet.glob(f"{WEIGHTS}*.safetensors"))
    if not shards:
        yield _no_safetensors(unet)
        return
    pickles = sorted(file.name for file in unet.glob("*.bin"))
    if pickles:
        yield Finding(
            "unused pickle", f"Beside the safetensors there are weights in {', '.join(pickles)}.",
            f"{len(pickles)} pickles, which were not opened: they may hold other weights",
            "Old programs load them instead, and a pickle can run any code.", "Delete them.", severity="note",
        )  # fmt: skip
    truncated = [f for file in shards for f in _examine_size(folder, file)]
    yield from truncated
    missing = _missing_shards(unet)
    if missing:
        yield Finding(
            "shards", f"The index of the weights names files that are not there: {', '.join(missing)}.",
            f"{len(missing)} of {len(missing) + len(shards)} files are missing", "The model can't be loaded.",
            _another(folder, AGAIN),
        )  # fmt: skip
    if not truncated and not missing:
        yield from _examine_shapes(folder, shards)


def _examine_json(folder: Path, name: str) -> Iterator[Finding]:
    file = folder / name
    try:
        if not isinstance(json.loads(file.read_text("utf-8")), dict):
            raise ValueError("it holds no mapping")
    except FileNotFoundError:
        parts = ("scheduler/scheduler_config.json", "unet/config.json")
        is_derived = name == "model_index.json" and all((folder / part).is_file() for part in parts)
        yield Finding(
            "missing file", f"{name} is missing.", f"0 bytes at {name}", "diffusers can't load the model.",
            "{fix}" if is_derived else _another(folder, AGAIN), Repair() if is_derived else None,
        )  # fmt: skip
    except (ValueError, RecursionError) as error:
        yield Finding(
            "damaged file", f"{name} is not valid JSON.", f"{file.stat().st_size:,} bytes: {error}",
            "The model can't be loaded.", _another(folder, AGAIN),
        )  # fmt: skip


def _examine_classes(folder: Path) -> Iterator[Finding]:
    """Names of classes in the configurations that are not those of an unconditional pixel-space model."""
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8"))
        of_unet = json.loads((folder / "unet" / "config.json").read_text("utf-8")).get("_class_name", NETWORK)
        named = {"model_index.json: unet": (index.get("unet") or [None])[-1], "unet/config.json: _class_name": of_unet}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return  # are findings already
    wrong = {place: (name, NETWORK) for place, name in named.items() if name != NETWORK}
    if index.get("_class_name") not in PIPELINES:
        wrong["model_index.json: _class_name"] = (index.get("_class_name"), "DDPMPipeline")
    for place, (found, expected) in wrong.items():
        yield Finding(
            "wrong class", f"{place} is {found}.", f"{found} instead of {expected}, in {len(wrong)} of 3 places",
            "diffusers looks for other parts, or builds another network: it does not load.",
            f"Write {expected} there, or {{fix}}", Repair(),
        )  # fmt: skip


def _no_safetensors(unet: Path) -> Finding:
    pickles = sorted(file.name for file in unet.glob("*.bin"))
    if not pickles:
        return Finding(
            "missing weights", "The network has no weights.", "0 weight files in unet/", "The model can't be loaded.",
            _another(unet.parent, AGAIN),
        )  # fmt: skip
    return Finding(
        "pickle", "The weights are stored as a pickle only.", f"{len(pickles)} pickles, 0 safetensors in unet/",
        "A pickle can run any code when it is loaded, and many programs refuse it.",
        f"Save it as safetensors: ddpm-hf convert {unet.parent} {unet.parent}-safe",
    )  # fmt: skip


def _examine_size(folder: Path, file: Path) -> Iterator[Finding]:
    """A truncated or damaged safetensors file: its header says how many bytes it must have."""
    try:
        with safe_open(file, "pt") as stored:
            list(stored.keys())
        return
    except (SafetensorError, OSError) as error:
        found, promised = file.stat().st_size, _promised_bytes(file)
        evidence = f"{found:,} of {promised:,} bytes" if promised else f"{found:,} bytes: {error}"
    yield Finding(
        "truncated", f"unet/{file.name} is damaged or incomplete.", evidence, "The model can't be loaded.",
        _another(folder, AGAIN),
    )  # fmt: skip


def _promised_bytes(file: Path) -> int | None:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length < 100_000_000:
            return None
        try:
            header = json.loads(stream.read(length))
            return 8 + length + max(t["data_offsets"][1] for name, t in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return None


def _missing_shards(unet: Path) -> list[str]:
    index = unet / f"{WEIGHTS}.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return [index.name]
    return sorted(name for name in names if not (unet / name).is_file())


def _examine_shapes(folder: Path, shards: list[Path]) -> Iterator[Finding]:
    """Weights that are not those of the network that unet/config.json describes."""
    found: dict[str, tuple[int, ...]] = {}
    for file in shards:
        with safe_open(file, "pt") as stored:
            found |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
    try:
        config: dict[str, Any] = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
        with torch.device("meta"):
            network = UNet2DModel.from_config(config)
    except Exception as error:  # whatever its layers raise
        yield Finding(
            "network configuration", "unet/config.json describes no network.", f"{type(error).__name__}: {error}",
            "The model can't be loaded.", _another(folder, AGAIN),
        )  # fmt: skip
        return
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    if missing or extra or other:
        first = (missing + other + extra)[0]
        yield Finding(
            "weights of another network",
            "The stored weights are not those of the network in unet/config.json.",
            f"{len(missing)} of {len(expected)} are missing, {len(other)} have another shape, {len(extra)} are new; "
            f"the first is {first}: {found.get(first, 'missing')}, expected {expected.get(first, 'none')}",
            "The model can't be loaded, or parts of the network stay random.",
            _another(folder, "Put back the configuration that belongs to these weights."),
        )  # fmt: skip


def stored_dtypes(folder: Path) -> Counter[torch.dtype]:
    """How many tensors the weights of a model have in which precision; other variants, such as fp16, do not count."""
    counts: Counter[torch.dtype] = Counter()
    for file in [
        *(folder / "unet").glob(f"{WEIGHTS}.safetensors"),
        *(folder / "unet").glob(f"{WEIGHTS}-*.safetensors"),
    ]:
        with safe_open(file, "pt") as stored:
            counts.update(stored.get_tensor(name).dtype for name in stored.keys())  # noqa: SIM118
    return counts


def _another(folder: Path, otherwise: str) -> str:
    """An intact checkpoint of the same run, if there is one, instead of a damaged pipeline."""
    place = folder.parent if folder.name.startswith("checkpoint-") else folder
    try:
        checkpoint, _ = latest_checkpoint(place)
    except OSError:
        checkpoint = None
    if checkpoint is None or checkpoint == folder:
        return otherwise
    return f"Use the newest intact checkpoint: ddpm-hf convert {checkpoint} {place}-repaired"
