"""The configuration of a run: one dataclass field = one flag = one YAML key. Defaults and help live nowhere else."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from .options import at_least, check_seed, check_types, fraction, option, positive

IMAGE_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # Pillow's name → channels
TRACKERS = ("tensorboard", "wandb", "trackio")
MIN_EVAL_IMAGES = 16
SECRETS = ("hub_token",)  # options that are written down nowhere


@dataclass
class DataOptions:
    """Which images, and what is done to them."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = option(
        None,
        "A dataset of the Hub, a local dataset folder, files (.parquet, .arrow, .tar of WebDataset; also by * and ?), "
        "or `digits`: the scans that scikit-learn ships.",
    )
    dataset_config_name: str | None = option(None, "The dataset's configuration, where it has several.")
    train_data_dir: str | None = option(None, "A folder of images with all its sub-folders, instead of a dataset.")
    cache_dir: str | None = option(
        None, "Where downloaded datasets and decoded images are kept. Default: the cache of `datasets`."
    )
    image_column: str | None = option(None, "The column that holds the images; found by its type if not given.")
    label_column: str | None = option(
        None,
        "Train class-conditionally with this column: ClassLabel, integers or text. In a folder of images, `label` "
        "is the name of the sub-folder. Default: unconditional.",
    )
    resolution: int = option(64, "Height and width of the images: they are cropped to a square and resized to it.")
    image_mode: str | None = option(
        None,
        "Mode of the images: L (grayscale), LA, RGB or RGBA. Default: by --channels. Without A, transparent "
        "parts become white.",
    )
    channels: int | None = option(None, "Channels of the images: 1, 2, 3 or 4. Default: by --image_mode, else 3.")
    resize: Literal["bicubic", "lanczos"] = option(
        "bicubic",
        "Antialiased resizing: bicubic, as the field resizes for FID, or the sharper Lanczos, which rings more.",
    )
    center_crop: bool = option(
        False,
        "Crop the centre; without this flag, a random part (fixed per image, by the seed and its place in the data).",
    )
    random_flip: bool = option(False, "Flip images horizontally with probability 1/2.")
    preserve_input_precision: bool = option(
        False, "Keep 16 bits per channel. (Pillow reads them from grayscale images; of 16-bit colour it keeps 8.)"
    )
    on_bad_image: Literal["raise", "skip"] = option(
        "raise", "End with the name of the first image that can't be read, or leave such images out and list them."
    )
    cache_limit_gb: float | None = option(
        None,
        "Decoded images are kept on disk up to this size, and beyond it decoded whenever needed; 0: always decode. "
        "Default: half of the free disk space.",
    )
    dataloader_num_workers: int = option(
        0, "Processes that decode images during training, where they are not kept; 0: the training process does."
    )
    streaming: bool = option(
        False,
        "Read the dataset while training, for what does not fit the disk; needs --max_train_steps. Every process reads "
        "all of the stream and decodes its part. Resuming reads on to its place: up to two epochs, not decoded.",
    )
    shuffle_buffer_size: int = option(1000, "Images among which a stream is shuffled; they are held in memory.")


@dataclass
class ModelOptions:
    """The network and the diffusion process."""

    _argument_group_name: ClassVar[str] = "network and process"

    model_config_name_or_path: str | None = option(
        None,
        "A `UNet2DModel` configuration: a folder, a file or a Hub id. Default: the network of train_unconditional.py.",
    )
    unet: dict | str | None = option(None, "The `UNet2DModel` arguments themselves, as YAML mapping or JSON text.")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("epsilon", "What the network predicts.")
    ddpm_num_steps: int = option(1000, "T, the number of diffusion steps.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = option(
        "linear", "The β schedule."
    )
    ddpm_num_inference_steps: int | None = option(
        None, "K, the steps per image of the sample grids. Default: 1000, or T where that is less."
    )
    timestep_spacing: Literal["linspace", "trailing", "leading"] = option(
        "linspace", "How K steps are spread over T; linspace goes from T - 1 to 0."
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = option(
        "fixed_small",
        "The reverse variance. learned_range doubles the output channels; it needs --objective hybrid or vlb.",
    )
    enable_xformers_memory_efficient_attention: bool = option(False, "Use the attention of xFormers.")


@dataclass
class LossOptions:
    """What is minimised."""

    _argument_group_name: ClassVar[str] = "loss"

    objective: Literal["simple", "hybrid", "vlb"] = option(
        "simple", "The paper's L_simple, the variational bound (vlb), or L_simple + --vlb_weight × the bound (hybrid)."
    )
    loss_weighting: Literal["uniform", "snr", "min_snr", "p2"] | None = option(
        None,
        "Weights of L_simple over the timesteps. Default: uniform; but snr for prediction_type sample, as in "
        "train_unconditional.py, and min_snr with --snr_gamma.",
    )
    snr_gamma: float | None = option(None, "γ of the min-SNR weighting. Default where that is chosen: 5.")
    p2_gamma: float = option(1.0, "γ of the P2 weighting 1/(k + SNR)^γ.")
    p2_k: float = option(1.0, "k of the P2 weighting.")
    vlb_weight: float = option(1e-3, "λ of the hybrid objective.")
    label_dropout: float = option(
        0.1, "With --label_column: the share of labels that are dropped, so that guidance is possible."
    )


@dataclass
class OptimizationOptions:
    """How it is minimised; all counts are in optimizer updates."""

    _argument_group_name: ClassVar[str] = "optimisation"

    train_batch_size: int = option(16, "Images per process and forward pass.")
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer update.")
    num_epochs: int = option(100, "Passes over the data.")
    max_train_steps: int | None = option(None, "Optimizer updates; overrides --num_epochs.")
    learning_rate: float = option(1e-4, "The peak learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("cosine", "The learning rate over the run, as diffusers defines them; `constant` has no warm-up.")
    lr_warmup_steps: int = option(500, "Updates of linear warm-up.")
    adam_beta1: float = option(0.95, "AdamW's β1.")
    adam_beta2: float = option(0.999, "AdamW's β2.")
    adam_weight_decay: float = option(1e-6, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW's ε.")
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm.")
    max_skipped_steps: int = option(
        50, "Updates without a finite gradient are skipped and counted; so many in a row end the run."
    )
    use_ema: bool = option(False, "Keep an exponential moving average of the weights, and export that.")
    ema_inv_gamma: float = option(1.0, "EMA warm-up: decay = 1 - (1 + step / inv_gamma)^-power.")
    ema_power: float = option(0.75, "EMA warm-up: see --ema_inv_gamma.")
    ema_max_decay: float = option(0.9999, "The largest decay of the EMA.")
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        None,
        "Precision of the network's forward pass; auto is bf16 where it is faster. On a GPU, fp16 and bf16 also let "
        "float32 products use TF32. Default: what `accelerate launch` says, else no.",
    )
    channels_last: Literal["no", "yes", "auto"] = option(
        "no", "Hold the channels of a pixel side by side, as tensor cores want them; auto does it where it is faster."
    )
    compile: Literal["no", "yes", "auto"] = option(
        "no",
        "Train through torch.compile; auto does it where that earns back the minutes it takes. Weights stay clean.",
    )
    seed: int = option(0, "Fixes the weights, the order of the data, the noise and the samples.")
    local_rank: int = option(-1, "Accepted for old launchers, and not needed: the environment says it.")


@dataclass
class OutputOptions:
    """What is written, where and when."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str = option("ddpm-model-64", "Where the pipeline, checkpoints, pictures and logs go.")
    overwrite_output_dir: bool = option(False, "Replace what an earlier run left in the output folder.")
    checkpointing_steps: int = option(500, "Save a checkpoint every so many updates.")
    checkpoints_total_limit: int | None = option(None, "Keep only so many checkpoints, the newest, and the best.")
    resume_from_checkpoint: str | None = option(
        None, "`latest` (a new run where there is none), or the path of the checkpoint to go on from."
    )
    save_model_epochs: int = option(
        10, "Write the pipeline into the output folder after the first epoch, and then every so many."
    )
    save_images_epochs: int = option(10, "Write sample grids after the first epoch, and then every so many.")
    save_images_steps: int | None = option(
        None,
        "The same in updates, the first time after a tenth of the number; overrides --save_images_epochs. 0: never.",
    )
    eval_batch_size: int = option(16, "Images in the sample grids.")
    calibration_images: int | None = option(
        None,
        "Calibrate the finished model for few steps on so many images, each of which costs T network calls. 0: not. "
        "Default: for a twentieth of the cost of the training, 256 at most; not if those are fewer than 16.",
    )
    report_to: list[str] | None = option(
        None, "Trackers: tensorboard, wandb, trackio, or none. Default: tensorboard where it is installed."
    )
    logger: Literal["tensorboard", "wandb"] | None = option(None, "One tracker, as train_unconditional.py spells it.")
    logging_dir: str = option("logs", "Folder of the logs, inside the output folder.")
    dry_run: bool = option(False, "Print the options, the size of the network and the plan of the run, and stop.")


@dataclass
class ValidationOptions:
    """How good the model is while it is trained, on images that it is not trained on."""

    _argument_group_name: ClassVar[str] = "validation"

    eval_steps: int | None = option(
        None,
        "Measure the exported weights every so many updates, and at the end: bits/dim of held-out images, and the "
        "Fréchet distance between them and as many samples. The best checkpoint is kept and named. Default: never.",
    )
    eval_images: int = option(256, "How many images: so many are held out, and so many samples are made.")
    eval_split: str | None = option(
        None,
        "The split of the dataset to take them from, e.g. test. Default: they are drawn from the training images, by "
        "the seed, and not trained on.",
    )
    metric_for_best_model: Literal["bits_per_dim", "frechet"] = option(
        "bits_per_dim", "Which of the two tells the best checkpoint."
    )
    load_best_model_at_end: bool = option(
        False, "Export the best checkpoint at the end, instead of the weights of the last update."
    )


@dataclass
class HubOptions:
    """Sharing."""

    _argument_group_name: ClassVar[str] = "the Hub"

    push_to_hub: bool = option(False, "Push the pipeline to the Hub, at checkpoints and at the end.")
    hub_model_id: str | None = option(None, "The repository. Default: the output folder's name, in your namespace.")
    hub_private_repo: bool = option(False, "Make the repository private, if it has to be created.")
    share_training_images: bool = option(
        False, "With --push_to_hub: also upload the pictures that show training images."
    )
    hub_token: str | None = option(None, "The token to push with. Default: that of `hf auth login`.")


GROUPS = (DataOptions, ModelOptions, LossOptions, OptimizationOptions, OutputOptions, ValidationOptions, HubOptions)


@dataclass
class TrainConfig(
    HubOptions, ValidationOptions, OutputOptions, OptimizationOptions, LossOptions, ModelOptions, DataOptions
):
    """Options of `training/train.py`. Names, meanings and defaults are those of diffusers' `train_unconditional.py`."""

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):  # `report_to: none` in a YAML file
            self.report_to = [self.report_to]
        for name in ("mixed_precision", "channels_last", "compile"):  # `no` and `yes` there
            if isinstance(getattr(self, name), bool):
                setattr(self, name, "yes" if getattr(self, name) else "no")
        check_types(self)
        at_least(
            1, self, "resolution", "shuffle_buffer_size", "train_batch_size", "gradient_accumulation_steps",
            "num_epochs", "max_train_steps", "ddpm_num_steps", "ddpm_num_inference_steps", "eval_batch_size",
            "checkpointing_steps", "checkpoints_total_limit", "save_model_epochs", "save_images_epochs",
            "max_skipped_steps", "eval_steps",
        )  # fmt: skip
        at_least(
            0, self, "calibration_images", "cache_limit_gb", "dataloader_num_workers", "save_images_steps",
            "lr_warmup_steps", "adam_weight_decay", "p2_gamma", "vlb_weight",
        )  # fmt: skip
        positive(
            self, "learning_rate", "max_grad_norm", "ema_inv_gamma", "ema_power", "adam_epsilon", "snr_gamma", "p2_k"
        )
        fraction(self, "adam_beta1", "adam_beta2", "ema_max_decay", "label_dropout")
        at_least(MIN_EVAL_IMAGES, self, "eval_images")
        check_seed(self.seed)
        self._check_data()
        self._check_model()
        self._check_output()
        self._check_validation()

    def _check_data(self) -> None:
        if self.dataset_name is None and self.train_data_dir is None:
            raise ValueError(
                "no images: pass --dataset_name NAME (a Hub dataset, or `digits`) or --train_data_dir FOLDER."
            )
        if self.dataset_name is not None and self.train_data_dir is not None:
            raise ValueError("both --dataset_name and --train_data_dir are given: leave one of them out.")
        self._resolve_image_mode()
        if self.streaming and self.dataset_name == "digits":
            raise ValueError("the digits can't be streamed: leave out --streaming.")
        if self.streaming and self.max_train_steps is None:
            raise ValueError(
                "how long a stream is, is not known before its end: pass --max_train_steps with --streaming."
            )

    def _check_model(self) -> None:
        if self.unet is not None and self.model_config_name_or_path is not None:
            raise ValueError("both --unet and --model_config_name_or_path are given: leave one of them out.")
        if isinstance(self.unet, str):
            self.unet = _json_mapping(self.unet)
        if self.ddpm_num_inference_steps is None:
            self.ddpm_num_inference_steps = min(1000, self.ddpm_num_steps)
        if self.ddpm_num_inference_steps > self.ddpm_num_steps:
            raise ValueError(
                f"`ddpm_num_inference_steps` is {self.ddpm_num_inference_steps}, but must not exceed `ddpm_num_steps`, "
                f"which is {self.ddpm_num_steps}."
            )
        learned = self.variance_type == "learned_range"
        if learned and self.objective == "simple":
            raise ValueError(
                "`variance_type` is 'learned_range', but L_simple does not train a variance: pass --objective hybrid."
            )
        if self.objective == "hybrid" and not learned:
            raise ValueError(
                f"`objective` is 'hybrid', but `variance_type` {self.variance_type!r} has nothing to learn from the "
                "bound: pass --variance_type learned_range."
            )
        if self.snr_gamma is not None and self.loss_weighting not in (None, "min_snr"):
            raise ValueError(
                f"`snr_gamma` is {self.snr_gamma}, but `loss_weighting` is {self.loss_weighting!r}: leave one of them "
                "out, or pass --loss_weighting min_snr."
            )
        if self.objective != "simple" and self.preserve_input_precision:
            raise ValueError(
                f"`objective` is {self.objective!r}, whose decoder knows the 256 levels of 8 bits only: leave out "
                "--preserve_input_precision."
            )
        if self.weighting != "p2" and (self.p2_gamma, self.p2_k) != (1.0, 1.0):
            raise ValueError(
                f"`p2_gamma` is {self.p2_gamma} and `p2_k` is {self.p2_k}, but the weighting is {self.weighting!r}: "
                "leave them out, or pass --loss_weighting p2."
            )
        if self.objective == "vlb" and (self.loss_weighting or self.snr_gamma):
            raise ValueError(
                "`objective` is 'vlb', which has its own weights: leave --loss_weighting and --snr_gamma out."
            )

    def _check_output(self) -> None:
        if not self.output_dir:
            raise ValueError("`output_dir` is empty: name a folder.")
        logs = Path(self.logging_dir)
        if logs.is_absolute() or ".." in logs.parts or not logs.parts:
            raise ValueError(f"`logging_dir` is {self.logging_dir!r}, but must be a folder inside the output folder.")
        if re.fullmatch(r"unet|scheduler|checkpoint-.*|.*\.partial", logs.parts[0]):
            raise ValueError(f"`logging_dir` is {self.logging_dir!r}, but that name is taken: choose another one.")
        if self.logger is not None and self.report_to not in (None, [self.logger]):
            raise ValueError(
                f"`logger` is {self.logger!r}, but `report_to` is {', '.join(self.report_to)}: leave --logger out."
            )
        unknown = sorted(set(self.report_to or ()) - {*TRACKERS, "none"})
        if unknown:
            raise ValueError(f"`report_to` has {', '.join(unknown)}, but knows only {', '.join(TRACKERS)} and none.")
        if self.report_to and "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"`report_to` is {', '.join(self.report_to)}: `none` stands alone, so leave it out.")
        of_pushes = ("hub_model_id", "hub_token", "hub_private_repo", "share_training_images")
        given = [f"--{name}" for name in of_pushes if getattr(self, name)]
        if given and not self.push_to_hub:
            raise ValueError(f"{' and '.join(given)} without --push_to_hub: add it, or leave {given[0]} out.")

    def _check_validation(self) -> None:
        options = fields(ValidationOptions)
        given = [f"--{f.name}" for f in options if getattr(self, f.name) != f.default]
        if self.eval_steps is not None:
            check_seed(self.seed, self.eval_images)
        elif given:
            raise ValueError(f"{' and '.join(given)} without --eval_steps: add it, or leave {given[0]} out.")
        if self.eval_split is not None and (self.train_data_dir is not None or self.dataset_name == "digits"):
            raise ValueError(
                f"`eval_split` is {self.eval_split!r}, but {self.train_data_dir or self.dataset_name} has no splits: "
                "leave it out, and images are held out of the training set."
            )
        if self.eval_split is not None and re.match(r"train(\W|$)", self.eval_split):
            raise ValueError(
                f"`eval_split` is {self.eval_split!r}, which is trained on: leave it out, or name another."
            )

    @property
    def weighting(self) -> Literal["uniform", "snr", "min_snr", "p2"]:
        """The weighting of L_simple, where `loss_weighting` leaves it open."""
        if self.loss_weighting is not None:
            return self.loss_weighting
        if self.snr_gamma is not None:
            return "min_snr"
        return "snr" if self.prediction_type == "sample" else "uniform"

    def public(self) -> dict[str, Any]:
        """The options as they may be written down: without secrets."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in SECRETS}

    def __repr__(self) -> str:
        return f"TrainConfig({', '.join(f'{k}={v!r}' for k, v in self.public().items())})"

    def _resolve_image_mode(self) -> None:
        """Fill in `image_mode` and `channels`, either from the other."""
        if self.channels is not None and self.channels not in IMAGE_MODES.values():
            raise ValueError(
                f"`channels` is {self.channels}, but must be 1 (grayscale), 2 (with alpha), 3 (RGB) or 4 (RGBA)."
            )
        mode = self.image_mode or next(mode for mode, n in IMAGE_MODES.items() if n == (self.channels or 3))
        if mode not in IMAGE_MODES:
            raise ValueError(f"`image_mode` is {mode!r}, but must be one of {', '.join(IMAGE_MODES)}.")
        if self.channels not in (None, IMAGE_MODES[mode]):
            raise ValueError(
                f"`channels` is {self.channels}, but `image_mode` {mode!r} has {IMAGE_MODES[mode]}: leave one out."
            )
        self.image_mode, self.channels = mode, IMAGE_MODES[mode]


def _json_mapping(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`unet` is not valid JSON ({error}): pass e.g. '{{\"layers_per_block\": 1}}'.") from error
    if not isinstance(value, dict):
        raise ValueError("`unet` must be a JSON object, e.g. '{\"layers_per_block\": 1}'.")
    return value
