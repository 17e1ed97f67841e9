"""The configuration of a run, in one file. Defaults and help texts live here and nowhere else."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from .options import at_least, check_seed, check_types, duration, fraction, option, positive

IMAGE_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # Pillow's name → channels
TRACKERS = ("tensorboard", "wandb", "trackio")
MIN_EVAL_IMAGES = 16
MAX_EMA_WIDTH = 0.28  # 1/√12, the standard deviation of a uniform distribution, is 0.2887
PAPER_BATCH_SIZE = 128  # Appendix B, of CIFAR-10
SECRETS = ("hub_token",)  # options that are never logged or saved


@dataclass
class DataOptions:
    """Which images, and how they are prepared."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_name: str | None = option(
        None,
        "A dataset of the Hub, a local dataset folder, files (.parquet, .arrow, .tar of WebDataset; * and ? work), "
        "or `digits`: the scans that scikit-learn ships.",
    )
    dataset_config_name: str | None = option(None, "The configuration of a dataset that has several.")
    train_data_dir: str | None = option(None, "A folder of images, searched recursively, instead of a dataset.")
    cache_dir: str | None = option(
        None, "Where downloaded datasets and decoded images are cached. Default: the cache of `datasets`."
    )
    image_column: str | None = option(None, "The column that holds the images. Default: found by its type.")
    label_column: str | None = option(
        None,
        "Train a class-conditional model on the labels in this column: ClassLabel, integers or text. In a folder of "
        "images, `label` is the name of the sub-folder. Default: unconditional.",
    )
    resolution: int = option(64, "Height and width in pixels: images are cropped to a square and resized to this size.")
    image_mode: str | None = option(
        None,
        "Mode of the images: L (grayscale), LA, RGB or RGBA. Default: from --channels. Without A, transparent "
        "parts become white.",
    )
    channels: int | None = option(None, "Channels of the images: 1, 2, 3 or 4. Default: from --image_mode, else 3.")
    resize: Literal["bicubic", "lanczos"] = option(
        "bicubic",
        "Antialiased resizing: bicubic, as is usual for FID, or Lanczos, which is sharper and rings more.",
    )
    center_crop: bool = option(
        False,
        "Crop the centre. Without this flag, crop a random part: the same one in every epoch, fixed by --seed.",
    )
    random_flip: bool = option(False, "Flip images horizontally with probability 1/2.")
    preserve_input_precision: bool = option(
        False, "Keep 16 bits per channel. Pillow reads 16 bits of grayscale images only; of 16-bit colour it keeps 8."
    )
    on_bad_image: Literal["raise", "skip"] = option(
        "raise", "Images that can't be read: stop and name the first one, or skip and list them."
    )
    cache_limit_gb: float | None = option(
        None,
        "Cache decoded images on disk if they fit this size; else decode them whenever they are needed. 0: no cache. "
        "Default: half of the free disk space.",
    )
    dataloader_num_workers: int = option(
        0, "Processes that decode images during training if they are not cached; 0: the training process itself."
    )
    streaming: bool = option(
        False,
        "Read the dataset while training, for datasets that do not fit on the disk; needs --max_train_steps. Every "
        "process reads the whole stream and decodes its share. Resuming skips forward to the same position: up to two "
        "epochs are read again, without decoding.",
    )
    shuffle_buffer_size: int = option(1000, "Images in the shuffle buffer of a stream; they are held in memory.")


@dataclass
class ModelOptions:
    """The network and the diffusion process."""

    _argument_group_name: ClassVar[str] = "network and process"

    model_config_name_or_path: str | None = option(
        None,
        "A `UNet2DModel` configuration: a folder, a file or a Hub id. Default: the network of train_unconditional.py.",
    )
    unet: dict | str | None = option(None, "The arguments of `UNet2DModel`, as a YAML mapping or JSON text.")
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = option("epsilon", "What the network predicts.")
    ddpm_num_steps: int = option(1000, "T, the number of diffusion steps.")
    ddpm_beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = option(
        "linear", "The β schedule."
    )
    ddpm_num_inference_steps: int | None = option(
        None, "K, the steps per image in sample grids. Default: 1000, or T if that is less."
    )
    timestep_spacing: Literal["linspace", "trailing", "leading"] = option(
        "linspace", "How K steps are spread over T; linspace runs from T - 1 to 0."
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] = option(
        "fixed_small",
        "The reverse variance. learned_range doubles the output channels; it needs --objective hybrid or vlb.",
    )
    enable_xformers_memory_efficient_attention: bool = option(False, "Use xFormers' attention.")


@dataclass
class LossOptions:
    """What is minimised."""

    _argument_group_name: ClassVar[str] = "loss"

    objective: Literal["simple", "hybrid", "vlb"] = option(
        "simple", "The paper's L_simple, the variational bound (vlb), or L_simple + --vlb_weight × the bound (hybrid)."
    )
    loss_weighting: Literal["uniform", "snr", "min_snr", "min_snr_v", "p2"] | None = option(
        None,
        "Weights of L_simple over the timesteps. Default: uniform; snr with --prediction_type sample, as in "
        "train_unconditional.py; min_snr with --snr_gamma.",
    )
    snr_gamma: float | None = option(
        None, "γ of the min-SNR weightings. Default with --loss_weighting min_snr and min_snr_v: 5."
    )
    p2_gamma: float = option(1.0, "γ of the P2 weighting 1/(k + SNR)^γ.")
    p2_k: float = option(1.0, "k of the P2 weighting.")
    vlb_weight: float = option(1e-3, "λ of the hybrid objective.")
    label_dropout: float = option(
        0.1, "With --label_column: the share of labels that are dropped, for classifier-free guidance."
    )


@dataclass
class OptimizationOptions:
    """How it is minimised. All counts are in optimizer updates."""

    _argument_group_name: ClassVar[str] = "optimisation"

    # None is no value of it: a union with None is how HfArgumentParser takes text and numbers.
    train_batch_size: int | str | None = option(
        16,
        "Images per process and forward pass; auto is the most that the GPU's memory holds, found by trial. A resumed "
        "run keeps what was found.",
    )
    gradient_accumulation_steps: int = option(1, "Forward passes per optimizer update.")
    global_batch_size: int | None = option(
        None,
        "Images per optimizer update, over all processes: sets --gradient_accumulation_steps. Default: what the other "
        f"options come to; with --train_batch_size auto {PAPER_BATCH_SIZE}, as in the paper.",
    )
    gradient_checkpointing: bool = option(
        False, "Compute the network's activations twice instead of storing them: slower, and in much less memory."
    )
    time_budget: str | None = option(
        None,
        "The time that the whole command may take: 30m, 8h, 1d12h. The learning rate follows the time, and the run "
        "ends with it. `ddpm-hf train` chooses all options that are not given for this time. A resumed run has the "
        "time that is left; +1h trains a finished run for an hour more.",
    )
    num_epochs: int = option(100, "Passes over the data.")
    max_train_steps: int | None = option(None, "Optimizer updates; overrides --num_epochs.")
    learning_rate: float = option(1e-4, "The peak learning rate.")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = option("cosine", "The learning-rate schedule, as in diffusers; `constant` has no warm-up.")
    lr_warmup_steps: int = option(500, "Updates of linear warm-up.")
    adam_beta1: float = option(0.95, "AdamW's β1.")
    adam_beta2: float = option(0.999, "AdamW's β2.")
    adam_weight_decay: float = option(1e-6, "AdamW's weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW's ε.")
    max_grad_norm: float = option(1.0, "Clip the gradient to this norm.")
    max_skipped_steps: int = option(
        50, "Updates without a finite gradient are skipped and counted; this many in a row end the run."
    )
    use_ema: bool = option(False, "Keep an exponential moving average of the weights and export it.")
    ema_inv_gamma: float = option(1.0, "EMA warm-up: decay = 1 - (1 + step / inv_gamma)^-power.")
    ema_power: float = option(0.75, "EMA warm-up: see --ema_inv_gamma.")
    ema_max_decay: float = option(0.9999, "The largest decay of the EMA.")
    ema_widths: list[float] | None = option(
        None,
        "With --use_ema: keep averages of these widths, standard deviations in parts of the run so far, instead of one "
        "with a decay. With --eval_steps, the one with the least loss on held-out images is exported in the end; else "
        "the middle one.",
    )
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        None,
        "Precision of the network's forward pass; auto is bf16 if it is faster here. On a GPU, fp16 and bf16 also let "
        "float32 products use TF32. Default: from `accelerate launch`, else no.",
    )
    channels_last: Literal["no", "yes", "auto"] = option(
        "no", "Store the channels of a pixel next to each other, which suits tensor cores; auto: if it is faster here."
    )
    compile: Literal["no", "yes", "auto"] = option(
        "no",
        "Train through torch.compile; auto: if the run is long enough to earn back the minutes that it takes.",
    )
    cpu_threads: int | None = option(
        None, "Threads of each process on a CPU. Default: the cores, divided among the processes of the machine."
    )
    seed: int = option(0, "Fixes the initial weights, the order of the data, the noise and the samples.")
    local_rank: int = option(-1, "Ignored: launchers pass it through the environment. Accepted for old ones.")


@dataclass
class OutputOptions:
    """What is written, where and when."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str = option("ddpm-model-64", "Folder for the pipeline, checkpoints, pictures and logs.")
    overwrite_output_dir: bool = option(False, "Replace the files of an earlier run in the output folder.")
    checkpointing_steps: int = option(500, "Save a checkpoint every N updates.")
    checkpoints_total_limit: int | None = option(
        None,
        "Keep only the N newest checkpoints, and the best one; 0: all. Default: 2, or what the resumed run kept; for "
        "training/train.py, as for train_unconditional.py, all.",
    )
    resume_from_checkpoint: str | None = option(
        None, "Resume from this checkpoint: a path, or `latest` (which starts a new run if there is none)."
    )
    save_model_epochs: int = option(
        10, "Save the pipeline in the output folder after the first epoch and then every N epochs."
    )
    save_images_epochs: int = option(10, "Sample grids of images after the first epoch and then every N epochs.")
    save_images_steps: int | None = option(
        None,
        "The same every N updates, the first time after N/10; overrides --save_images_epochs. 0: never.",
    )
    eval_batch_size: int = option(16, "Images in the sample grids.")
    calibration_images: int | None = option(
        None,
        "Calibrate the finished model for few steps on N images, each of which costs T network calls. 0: skip it. "
        "Default: as many as cost a twentieth of the training, up to 256; none if that is fewer than 16.",
    )
    report_to: list[str] | None = option(
        None, "Trackers: tensorboard, wandb, trackio, or none. Default: tensorboard if it is installed."
    )
    logger: Literal["tensorboard", "wandb"] | None = option(
        None, "One tracker: the spelling of train_unconditional.py."
    )
    logging_dir: str = option("logs", "Folder for the logs, inside the output folder.")
    dry_run: bool = option(False, "Print the options, the network's size and the plan of the run, then exit.")


@dataclass
class ValidationOptions:
    """Measurements during training, on images that are not trained on."""

    _argument_group_name: ClassVar[str] = "validation"

    eval_steps: int | None = option(
        None,
        "Measure the weights that would be exported every N updates and at the end: bits/dim of held-out images, and "
        "the Fréchet distance from them to the same number of samples. The best checkpoint is kept. Default: never.",
    )
    eval_images: int = option(256, "Number of held-out images, and of samples.")
    eval_split: str | None = option(
        None,
        "The dataset's split to take these images from, e.g. test. Default: drawn from the training images by --seed, "
        "and not trained on.",
    )
    metric_for_best_model: Literal["bits_per_dim", "frechet"] = option(
        "bits_per_dim", "The metric that selects the best checkpoint."
    )
    load_best_model_at_end: bool = option(
        False,
        "Export the best checkpoint at the end instead of the last weights, unless that may be better by chance: its "
        "bits/dim by less than two standard errors of the difference on the same held-out images.",
    )
    early_stopping_patience: int | None = option(
        None,
        "End the run after N validations in a row that were not better than the best before by a thousandth, and "
        "export the best. Default: never.",
    )


@dataclass
class HubOptions:
    """Pushing to the Hub."""

    _argument_group_name: ClassVar[str] = "the Hub"

    push_to_hub: bool = option(False, "Push the pipeline to the Hub at every checkpoint and at the end.")
    hub_model_id: str | None = option(None, "The repository. Default: the output folder's name in your namespace.")
    hub_private_repo: bool = option(False, "Make the repository private if it does not exist yet.")
    share_training_images: bool = option(
        False, "With --push_to_hub: also upload the pictures that show training images."
    )
    hub_token: str | None = option(
        None, "Access token. Default: that of HF_TOKEN or `hf auth login`, which other users can't see in `ps`."
    )


GROUPS = (DataOptions, ModelOptions, LossOptions, OptimizationOptions, OutputOptions, ValidationOptions, HubOptions)


@dataclass
class TrainConfig(
    HubOptions, ValidationOptions, OutputOptions, OptimizationOptions, LossOptions, ModelOptions, DataOptions
):
    """Options of `ddpm-hf train`. Names, meanings and defaults are those of diffusers' `train_unconditional.py`.

    But for one: a run keeps few checkpoints unless `checkpoints_total_limit` says otherwise.
    """

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):  # `report_to: none` in a YAML file
            self.report_to = [self.report_to]
        for name in ("mixed_precision", "channels_last", "compile"):  # `no` and `yes` there
            if isinstance(getattr(self, name), bool):
                setattr(self, name, "yes" if getattr(self, name) else "no")
        self._check_batch_size()
        check_types(self)
        at_least(
            1, self, "resolution", "shuffle_buffer_size", "gradient_accumulation_steps", "global_batch_size",
            "num_epochs", "max_train_steps", "ddpm_num_steps", "ddpm_num_inference_steps", "eval_batch_size",
            "checkpointing_steps", "save_model_epochs", "save_images_epochs", "max_skipped_steps", "eval_steps",
            "early_stopping_patience", "cpu_threads",
        )  # fmt: skip
        at_least(
            0, self, "calibration_images", "cache_limit_gb", "dataloader_num_workers", "save_images_steps",
            "checkpoints_total_limit", "lr_warmup_steps", "adam_weight_decay", "p2_gamma", "vlb_weight",
        )  # fmt: skip
        positive(
            self, "learning_rate", "max_grad_norm", "ema_inv_gamma", "ema_power", "adam_epsilon", "snr_gamma", "p2_k"
        )
        fraction(self, "adam_beta1", "adam_beta2", "ema_max_decay", "label_dropout")
        at_least(MIN_EVAL_IMAGES, self, "eval_images")
        check_seed(self.seed)
        self._check_averages()
        self._check_time()
        self._check_data()
        self._check_model()
        self._check_output()
        self._check_validation()

    def _check_batch_size(self) -> None:
        value = self.train_batch_size
        if isinstance(value, str) and value.isdecimal():
            value = self.train_batch_size = int(value)
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"`train_batch_size` is {value!r}, but must be an integer of at least 1, or 'auto'.")
        if value == "auto" and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"`gradient_accumulation_steps` is {self.gradient_accumulation_steps}, but `train_batch_size` 'auto' "
                "sets it: leave it out, and choose the images per update with --global_batch_size."
            )

    def _check_averages(self) -> None:
        wrong = next((width for width in self.ema_widths or () if not 0 < width <= MAX_EMA_WIDTH), None)
        if wrong is not None or len(set(self.ema_widths or ())) < len(self.ema_widths or ()):
            raise ValueError(
                f"`ema_widths` is {self.ema_widths}, but must be different numbers in (0, {MAX_EMA_WIDTH}], of which "
                "the largest averages the whole run."
            )

    def _check_time(self) -> None:
        if self.time_budget is not None:
            duration(self.time_budget, "time_budget")
            if self.max_train_steps is not None:
                raise ValueError(
                    f"`max_train_steps` is {self.max_train_steps}, but `time_budget` {self.time_budget} decides when "
                    "the run ends: leave one of them out."
                )

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
        if self.streaming and self.max_train_steps is None and self.time_budget is None:
            raise ValueError("--streaming needs --max_train_steps or --time_budget: the length of a stream is unknown.")

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
        if self.loss_weighting == "min_snr_v" and self.prediction_type == "epsilon":
            raise ValueError(
                "`loss_weighting` is 'min_snr_v', which weights noise the more, the less of the image is left, so that "
                "ε can't be trained with it: pass --prediction_type v_prediction, or --loss_weighting min_snr."
            )
        if self.snr_gamma is not None and self.loss_weighting not in (None, "min_snr", "min_snr_v"):
            raise ValueError(
                f"`snr_gamma` is {self.snr_gamma}, but `loss_weighting` is {self.loss_weighting!r}: leave one of them "
                "out, or pass --loss_weighting min_snr."
            )
        if self.objective != "simple" and self.preserve_input_precision:
            raise ValueError(
                f"`objective` is {self.objective!r}, whose decoder is for the 256 levels of 8 bits: leave out "
                "--preserve_input_precision."
            )
        if self.weighting != "p2" and (self.p2_gamma, self.p2_k) != (1.0, 1.0):
            raise ValueError(
                f"`p2_gamma` is {self.p2_gamma} and `p2_k` is {self.p2_k}, but the weighting is {self.weighting!r}: "
                "leave them out, or pass --loss_weighting p2."
            )
        if self.objective == "vlb" and (self.loss_weighting or self.snr_gamma):
            raise ValueError(
                "`objective` is 'vlb', which has its own weights: leave out --loss_weighting and --snr_gamma."
            )

    def _check_output(self) -> None:
        if not self.output_dir:
            raise ValueError("`output_dir` is empty: name a folder.")
        logs = Path(self.logging_dir)
        if logs.is_absolute() or ".." in logs.parts or not logs.parts:
            raise ValueError(f"`logging_dir` is {self.logging_dir!r}, but must be a folder inside the output folder.")
        if self.logger is not None and self.report_to not in (None, [self.logger]):
            raise ValueError(
                f"`logger` is {self.logger!r}, but `report_to` is {', '.join(self.report_to)}: leave --logger out."
            )
        unknown = sorted(set(self.report_to or ()) - {*TRACKERS, "none"})
        if unknown:
            raise ValueError(f"`report_to` has {', '.join(unknown)}, but must be of {', '.join(TRACKERS)} and none.")
        if self.report_to and "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(
                f"`report_to` is {', '.join(self.report_to)}: `none` excludes other trackers, so leave it out."
            )
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
    def batch_size(self) -> int:
        """`train_batch_size`, once it is a number."""
        if not isinstance(self.train_batch_size, int):
            raise ValueError("`train_batch_size` is 'auto', which only a run finds out: pass a number.")
        return self.train_batch_size

    @property
    def budget_seconds(self) -> float | None:
        """`time_budget` in seconds."""
        return None if self.time_budget is None else duration(self.time_budget, "time_budget")

    @property
    def adds_time(self) -> bool:
        """Whether `time_budget` is counted from now, as in +1h."""
        return self.time_budget is not None and self.time_budget.startswith("+")

    @property
    def weighting(self) -> Literal["uniform", "snr", "min_snr", "min_snr_v", "p2"]:
        """The weighting of L_simple: `loss_weighting`, or what follows from the other options."""
        if self.loss_weighting is not None:
            return self.loss_weighting
        if self.snr_gamma is not None:
            return "min_snr"
        return "snr" if self.prediction_type == "sample" else "uniform"

    def public(self) -> dict[str, Any]:
        """The options without secrets, which may be logged and saved."""
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
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"`unet` is not valid JSON ({error}): pass e.g. '{{\"layers_per_block\": 1}}'.") from error
    if not isinstance(value, dict):
        raise ValueError("`unet` must be a JSON object, e.g. '{\"layers_per_block\": 1}'.")
    return value
