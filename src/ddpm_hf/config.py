"""The configuration: one dataclass field = one flag = one YAML key. Defaults and help texts live nowhere else."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser


def _option(default: Any, help: str, aliases: Sequence[str] = ()) -> Any:
    return field(default=default, metadata={"help": help, "aliases": list(aliases)})


def _positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}, but must be at least 1.")


def _choices(config: object) -> None:
    """Check types, and the options that have a fixed set of values; argparse does so for flags only, not for YAML."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                allowed = ", ".join(map(repr, get_args(hint)))
                raise ValueError(f"`{name}` is {value!r}, but must be one of {allowed}.")
            continue
        types = tuple(get_origin(t) or t for t in get_args(hint) or (hint,))
        if float in types:
            types = (*types, int)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(t.__name__ for t in types if t is not type(None))
            raise ValueError(f"`{name}` is {value!r}, but must be of type {wanted}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}, but must be finite.")


def _seed(seed: int, images: int = 1) -> None:
    if not 0 <= seed <= 2**63 - images:
        raise ValueError(f"`seed` is {seed}, but must lie between 0 and 2^63 - {images}.")


def _fraction(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` is {value}, but must lie in [0, 1).")


@dataclass
class TrainConfig:
    """Options of `training/train.py`. Names and defaults follow diffusers' `train_unconditional.py`."""

    # --- data
    dataset_name: str | None = _option(
        None, "A dataset of the Hub, a local dataset folder, or `digits`: the scans that scikit-learn ships."
    )
    dataset_config_name: str | None = _option(None, "The dataset's configuration, where it has several.")
    train_data_dir: str | None = _option(None, "A folder of images, instead of a dataset.")
    cache_dir: str | None = _option(None, "Where downloaded datasets are kept.")
    image_column: str | None = _option(None, "The column that holds the images; found by its type if not given.")
    resolution: int = _option(64, "Height and width of the images: they are resized and cropped to it.")
    channels: int = _option(3, "Channels of the images: 1 (grayscale), 3 (RGB) or 4 (RGBA).")
    center_crop: bool = _option(False, "Crop the centre; without this flag, a random part (fixed per image).")
    random_flip: bool = _option(False, "Flip images horizontally with probability 1/2.")

    # --- network and process
    model_config_name_or_path: str | None = _option(
        None,
        "A `UNet2DModel` configuration: a folder, a file or a Hub id. Default: the network of train_unconditional.py.",
    )
    unet: dict | str | None = _option(None, "The `UNet2DModel` arguments themselves, as YAML mapping or JSON text.")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = _option("epsilon", "What the network predicts.")
    ddpm_num_steps: int = _option(1000, "T, the number of diffusion steps.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = _option(
        "linear", "The β schedule."
    )
    ddpm_num_inference_steps: int = _option(1000, "K, the steps per image of the sample grids.")
    timestep_spacing: Literal["linspace", "trailing", "leading"] = _option(
        "linspace", "How K steps are spread over T; linspace goes from T - 1 to 0."
    )
    variance_type: Literal["fixed_small", "fixed_large"] = _option(
        "fixed_small", "The reverse variance that is written into the model."
    )
    snr_gamma: float | None = _option(
        None, "Weight the loss by min-SNR with this γ, e.g. 5. Default: the paper's L_simple."
    )

    # --- optimisation
    train_batch_size: int = _option(16, "Images per process and forward pass.")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimizer update.")
    num_epochs: int = _option(100, "Passes over the data.")
    max_train_steps: int | None = _option(None, "Optimizer updates; overrides --num_epochs.")
    learning_rate: float = _option(1e-4, "The peak learning rate.")
    lr_scheduler: Literal["cosine", "linear", "constant"] = _option(
        "cosine", "After the warm-up: down to 0 as a cosine or a line, or constant."
    )
    lr_warmup_steps: int = _option(500, "Updates of linear warm-up.")
    adam_beta1: float = _option(0.95, "AdamW's β1.")
    adam_beta2: float = _option(0.999, "AdamW's β2.")
    adam_weight_decay: float = _option(1e-6, "AdamW's weight decay.")
    adam_epsilon: float = _option(1e-8, "AdamW's ε.")
    max_grad_norm: float = _option(1.0, "Clip the gradient to this norm.")
    use_ema: bool = _option(False, "Keep an exponential moving average of the weights, and export that.")
    ema_inv_gamma: float = _option(1.0, "EMA warm-up: decay = 1 - (1 + step / inv_gamma)^-power.")
    ema_power: float = _option(0.75, "EMA warm-up: see --ema_inv_gamma.")
    ema_max_decay: float = _option(0.9999, "The largest decay of the EMA.")
    mixed_precision: Literal["no", "fp16", "bf16"] = _option("no", "Precision of the network's forward pass.")
    seed: int = _option(0, "Fixes the weights, the order of the data, the noise and the samples.")

    # --- output
    output_dir: str = _option("ddpm-model-64", "Where the pipeline, checkpoints, pictures and logs go.")
    overwrite_output_dir: bool = _option(False, "Replace what an earlier run left in the output folder.")
    checkpointing_steps: int = _option(500, "Save a checkpoint every so many updates.")
    checkpoints_total_limit: int | None = _option(None, "Keep only so many checkpoints, the newest.")
    resume_from_checkpoint: str | None = _option(None, "`latest`, or the path of a checkpoint to go on from.")
    eval_batch_size: int = _option(16, "Images in the sample grids.")
    save_images_steps: int | None = _option(
        None, "Write a sample grid every so many updates. Default: only at the end."
    )
    logger: Literal["none", "tensorboard", "wandb", "trackio"] = _option("none", "Tracker to report to.")
    logging_dir: str = _option("logs", "Folder of the logs, inside the output folder.")

    def __post_init__(self) -> None:
        _choices(self)
        _positive(
            self, "resolution", "train_batch_size", "gradient_accumulation_steps", "num_epochs", "max_train_steps",
            "ddpm_num_steps", "ddpm_num_inference_steps", "eval_batch_size", "checkpointing_steps",
            "checkpoints_total_limit", "save_images_steps",
        )  # fmt: skip
        _seed(self.seed)
        _fraction(self, "adam_beta1", "adam_beta2", "ema_max_decay")
        if self.dataset_name is None and self.train_data_dir is None:
            raise ValueError(
                "no images: pass --dataset_name NAME (a Hub dataset, or `digits`) or --train_data_dir FOLDER."
            )
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("both --dataset_name and --train_data_dir are given: leave one of them out.")
        if self.channels not in (1, 3, 4):
            raise ValueError(f"`channels` is {self.channels}, but must be 1 (grayscale), 3 (RGB) or 4 (RGBA).")
        for name in ("learning_rate", "max_grad_norm", "ema_inv_gamma", "ema_power", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be positive.")
        if self.adam_weight_decay < 0:
            raise ValueError(f"`adam_weight_decay` is {self.adam_weight_decay}, but must be at least 0.")
        if not self.output_dir:
            raise ValueError("`output_dir` is empty: name a folder.")
        logs = Path(self.logging_dir)
        if logs.is_absolute() or ".." in logs.parts or not logs.parts:
            raise ValueError(f"`logging_dir` is {self.logging_dir!r}, but must be a folder inside the output folder.")
        if self.lr_warmup_steps < 0:
            raise ValueError(f"`lr_warmup_steps` is {self.lr_warmup_steps}, but must be at least 0.")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"`snr_gamma` is {self.snr_gamma}, but must be positive, e.g. 5.")
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError(
                f"`ddpm_num_inference_steps` is {self.ddpm_num_inference_steps}, but must not exceed `ddpm_num_steps`, "
                f"which is {self.ddpm_num_steps}."
            )
        if self.unet is not None and self.model_config_name_or_path is not None:
            raise ValueError("both --unet and --model_config_name_or_path are given: leave one of them out.")
        if isinstance(self.unet, str):
            self.unet = _json_mapping(self.unet)


@dataclass
class SampleConfig:
    """Options of `ddpm-hf sample`."""

    num_images: int = _option(64, "How many images to make.")
    seed: int = _option(0, "Image i comes from the random numbers of seed + i, whatever the batch size.")
    output_dir: str = _option("samples", "Folder for the numbered PNGs and the grid.")
    num_inference_steps: int | None = _option(None, "K, steps per image; default: the model's T.", ["--steps"])
    timestep_spacing: Literal["model", "linspace", "trailing", "leading", "optimal"] = _option(
        "model", "How K steps are spread over T; `optimal` needs a calibrated model.", ["--spacing"]
    )
    variance_type: Literal["model", "fixed_small", "fixed_large", "optimal"] = _option(
        "model", "σ² of a step; `optimal` needs a calibrated model."
    )
    eta: float | None = _option(None, "From 0 (DDIM) to 1 (ancestral DDPM, the default).")
    solver_order: Literal[1, 2] = _option(1, "2 corrects steps by the change of x̂_0: much better in few steps.")
    class_label: list[int] | None = _option(None, "For class-conditional models: labels, used in turn.")
    guidance_scale: float = _option(1.0, "Classifier-free guidance; 1 is off.")
    batch_size: int = _option(64, "Images per forward pass.")
    device: str | None = _option(None, "cpu, cuda, mps, …; default: the best one present.")
    dtype: Literal["float32", "bfloat16", "float16"] = _option("float32", "Precision of the network.")
    revision: str | None = _option(None, "Branch, tag or commit of a Hub model.")

    def __post_init__(self) -> None:
        _choices(self)
        _positive(self, "num_images", "batch_size", "num_inference_steps")
        _seed(self.seed, self.num_images)
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` is {self.eta}, but must lie in [0, 1]: 0 is DDIM, 1 is DDPM.")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` is {self.guidance_scale}, but must be at least 0 (1 is no guidance).")


@dataclass
class CalibrateConfig:
    """Options of `ddpm-hf calibrate`. The size and the channels of the images are the model's."""

    dataset_name: str | None = _option(
        None,
        "A dataset of the Hub, a local dataset folder, or `digits`: the scans that scikit-learn ships.",
        ["--dataset"],
    )
    dataset_config_name: str | None = _option(None, "The dataset's configuration, where it has several.")
    train_data_dir: str | None = _option(None, "A folder of images, instead of a dataset.")
    cache_dir: str | None = _option(None, "Where downloaded datasets are kept.")
    image_column: str | None = _option(None, "The column that holds the images; found by its type if not given.")
    center_crop: bool = _option(False, "Crop the centre; without this flag, a random part. As in training.")
    num_images: int = _option(256, "How many images to measure on, drawn at random: each costs T network calls.")
    seed: int = _option(0, "Fixes the choice of images and their noise.")
    batch_size: int = _option(64, "Images per forward pass.")
    output_dir: str | None = _option(None, "Where to save the calibrated model. Default: into its own folder.")
    device: str | None = _option(None, "cpu, cuda, mps, …; default: the best one present.")
    revision: str | None = _option(None, "Branch, tag or commit of a Hub model.")

    def __post_init__(self) -> None:
        _choices(self)
        _positive(self, "num_images", "batch_size")
        _seed(self.seed, self.num_images)
        if (self.dataset_name is None) == (self.train_data_dir is None):
            raise ValueError(
                "pass one of --dataset_name NAME (a Hub dataset, or `digits`) and --train_data_dir FOLDER: the images "
                "that the model was trained on."
            )


def parse_train_config(argv: Sequence[str], default_preset: Path) -> TrainConfig:
    """Flags over YAML over defaults. Without a source of images, `default_preset` is the YAML file.

    Raises:
        SystemExit: with argparse's message, for unknown flags or values of the wrong type.
        ValueError: naming the option, for values that make no sense.
    """
    parser = HfArgumentParser(
        [TrainConfig],
        prog="train.py",
        usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE …]",
        description="Train a DDPM. Without any option: scikit-learn's digits, in about five minutes on two CPU cores.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", type=Path, help="Options from a YAML file; flags override it.")
    given = parser.parse_args(list(argv))
    has_source = given.dataset_name is not None or given.train_data_dir is not None
    file = given.config or (None if has_source else default_preset)
    if file is not None:
        parser.set_defaults(**_read_yaml(file, {f.name for f in fields(TrainConfig)}))
        if has_source:  # a source on the command line replaces the file's
            parser.set_defaults(dataset_name=None, train_data_dir=None)
    options = vars(parser.parse_args(list(argv)))
    options.pop("config")
    return TrainConfig(**options)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, short names for its value, and its default if it has one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(120, shutil.get_terminal_size().columns))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0 or not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def _read_yaml(file: Path, known: set[str]) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"`config` is {str(file)!r}, but there is no such file.")
    try:
        options = yaml.safe_load(file.read_text("utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} must hold `option: value` lines.")
    unknown = sorted(str(name) for name in options if name not in known)
    if unknown:
        raise ValueError(f"{file} has unknown options {', '.join(unknown)}: see --help for those that exist.")
    return options


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`unet` is not valid JSON ({error}): pass e.g. '{{\"layers_per_block\": 1}}'.") from error
    if not isinstance(value, dict):
        raise ValueError("`unet` must be a JSON object, e.g. '{\"layers_per_block\": 1}'.")
    return value


def exit_with_error(error: Exception) -> None:
    """End a command with the message of a foreseen error, without a traceback."""
    sys.exit(f"error: {error}")
