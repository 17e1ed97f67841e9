"""The state of a run: its moving parts, saved to a checkpoint and restored by any number of processes."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..config.training import TrainConfig
from ..diffusion.pipeline import DDPMPipelineCustom
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..distributed import Agreement
from ..storage.checkpoint import TrainingState, load_checkpoint
from .averages import EVERY, PowerFunctionEMA
from .deadline import Clock
from .network import ema_weights, local_weights, unet_with_weights
from .plan import Plan

FULL_STATE_DICT = StateDictOptions(full_state_dict=True, cpu_offload=True)  # unsharded

# Options that a resumed run must share with its checkpoint, and those whose change is not reported.
MODEL_OPTIONS = (
    "unet", "model_config_name_or_path", "resolution", "image_mode", "label_column", "prediction_type",
    "ddpm_num_steps", "ddpm_beta_schedule", "use_ema",
)  # fmt: skip
FREE_TO_CHANGE = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank", "dry_run", "logger", "report_to",
    "cache_dir", "checkpoints_total_limit", "push_to_hub", "hub_model_id", "hub_private_repo", "share_training_images",
)  # fmt: skip

# Options that may differ between the machines of a run: places on their disks, and what costs them time.
MACHINE_OPTIONS = (
    "output_dir", "cache_dir", "train_data_dir", "dataset_name", "model_config_name_or_path", "resume_from_checkpoint",
    "local_rank", "dataloader_num_workers", "cache_limit_gb",
)  # fmt: skip


@dataclass
class Run:
    """A run: its configuration, its moving parts and its progress."""

    config: TrainConfig
    plan: Plan
    scheduler: DDPMSchedulerCustom
    accelerator: Accelerator
    agreement: Agreement
    unet: torch.nn.Module  # as Accelerate prepared it
    optimizer: Any
    ema: EMAModel | None
    other_averages: list[PowerFunctionEMA] = field(default_factory=list)  # of which one may be exported in the end
    clock: Clock | None = None  # with a time budget
    label_names: list[str] | None = None
    dataset: str = ""  # its name, as `Images.name` gives it
    step: int = 0  # updates done
    saved_step: int = 0  # updates in the last checkpoint
    images_seen: int = 0
    seconds: float = 0.0  # of training, resumed parts included
    unlogged: list[list[float]] = field(default_factory=list)  # losses since the last line of the log
    copies: str = ""  # how many samples copy a training image, in words, where that was measured

    @property
    def network(self) -> UNet2DModel:
        """The network itself, without the wrappers of distribution and compilation."""
        return self.accelerator.unwrap_model(self.unet, keep_torch_compile=False)

    @property
    def num_classes(self) -> int | None:
        """The number of labels; None for unconditional training."""
        return None if self.label_names is None else len(self.label_names)

    @property
    def ema_decay(self) -> float | None:
        """The decay of the latest EMA update, if the run keeps an EMA."""
        return None if self.ema is None else self.ema.cur_decay_value

    def pipeline(self) -> DDPMPipelineCustom:
        """A pipeline around the network, with a scheduler of its own."""
        return DDPMPipelineCustom(self.network, DDPMSchedulerCustom.from_config(self.scheduler.config))

    def advance(self, seconds: float, cpu_seconds: float = 0.0) -> None:
        """Count an update, and the time of the process's threads that it took."""
        self.step += 1
        self.images_seen += self.plan.global_batch
        self.seconds += seconds
        if self.clock is not None:
            self.clock.add_update(seconds, cpu_seconds / torch.get_num_threads())

    def measuring(self, name: str) -> AbstractContextManager[None]:
        """Within this context happens what follows the last update, too: a time budget sets its time aside."""
        return nullcontext() if self.clock is None else self.clock.measuring(name)


def full_weights(run: Run) -> dict[str, Tensor]:
    """The current weights, unsharded, on the CPU of the main process. All processes must call it."""
    weights: dict[str, Any] = get_model_state_dict(run.unet, options=FULL_STATE_DICT)
    return {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}


def exported_network(run: Run) -> UNet2DModel | None:
    """In the main process: a copy of the network on the CPU, with the EMA weights if the run keeps an EMA.

    All processes must call it.
    """
    with ema_weights(run.ema, run.unet):
        weights = full_weights(run)
    return unet_with_weights(run.network.config, weights) if run.accelerator.is_main_process else None


def capture(run: Run) -> tuple[TrainingState, UNet2DModel | None]:
    """What a checkpoint holds, and the network of its pipeline. All processes must call it."""
    full: dict[str, Any] = get_optimizer_state_dict(run.unet, run.optimizer.optimizer, options=FULL_STATE_DICT)
    moments = full.get("state", {})  # empty in other processes
    scaler = run.accelerator.scaler
    progress = {
        "step": run.step,
        "images_seen": run.images_seen,
        "seconds": run.seconds,
        "max_steps": run.plan.max_steps,
        "num_images": run.plan.num_images,
        "label_names": run.label_names,
        "num_processes": run.plan.num_processes,
        "unlogged": run.unlogged,
        "grad_scaler": scaler.state_dict() if scaler is not None else None,
        "config": run.config.public(),
    }
    if run.clock is not None:
        progress["clock"] = run.clock.state()
    averages: dict[str, Tensor] = {}
    if isinstance(run.ema, PowerFunctionEMA):
        progress["ema_width"] = run.ema.width
    for average in run.other_averages:
        with ema_weights(average, run.unet):
            averages |= {f"{average.width}/{name}": weight for name, weight in full_weights(run).items()}
    optimizer = {f"{name}/{key}": value for name, values in moments.items() for key, value in values.items()}
    return TrainingState(progress, full_weights(run), optimizer, averages=averages), exported_network(run)


def restore(run: Run, folder: Path) -> None:
    """Load a checkpoint, which the main process reads, into a run. All processes must call it.

    Raises:
        ValueError: for a damaged checkpoint.
    """
    agreement, state = run.agreement, None
    with agreement.together():
        if run.accelerator.is_main_process:
            state = load_checkpoint(folder)
            _check_tensors(folder, state, run.network)
    progress = agreement.from_main({} if state is None else state.progress)
    moments: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, value in agreement.tensors_from_main(None if state is None else state.optimizer).items():
        parameter, _, key = name.rpartition("/")
        moments[parameter][key] = value
    current_options = get_optimizer_state_dict(run.unet, run.optimizer.optimizer)["param_groups"]
    optimizer: dict[str, Any] = {"state": dict(moments), "param_groups": current_options}
    set_optimizer_state_dict(run.unet, run.optimizer.optimizer, optimizer, options=FULL_STATE_DICT)
    _order_moments(run.optimizer.optimizer)
    if run.ema is not None:
        exported = agreement.tensors_from_main(None if state is None else state.ema)
        others = agreement.tensors_from_main(None if state is None else state.averages)
        for average in _in_order(run, progress.get("ema_width")):
            prefix = f"{getattr(average, 'width', None)}/"
            kept = {name.removeprefix(prefix): w for name, w in others.items() if name.startswith(prefix)}
            _set_average(run, average, kept or exported, progress["step"])
    weights = agreement.tensors_from_main(None if state is None else state.weights)
    set_model_state_dict(run.unet, {**weights}, options=FULL_STATE_DICT)
    if run.accelerator.scaler is not None and progress["grad_scaler"] is not None:
        run.accelerator.scaler.load_state_dict(progress["grad_scaler"])
    run.step = progress["step"]
    if agreement.from_main(folder.resolve().parent == Path(run.config.output_dir).resolve()):  # else this has none yet
        run.saved_step = progress["step"]
    run.images_seen, run.seconds = progress["images_seen"], progress["seconds"]
    run.unlogged = progress["unlogged"]


def _in_order(run: Run, exported_width: float | None) -> list[EMAModel]:
    """All averages of a run, of which the one of this width becomes the exported one, as it was in its checkpoint."""
    for i, average in enumerate(run.other_averages):
        if average.width == exported_width and isinstance(run.ema, PowerFunctionEMA):
            run.ema, run.other_averages[i] = average, run.ema
    return [*([] if run.ema is None else [run.ema]), *run.other_averages]


def _set_average(run: Run, average: EMAModel, weights: dict[str, Tensor], step: int) -> None:
    set_model_state_dict(run.unet, {**weights}, options=FULL_STATE_DICT)
    with torch.no_grad():
        for shadow, weight in zip(average.shadow_params, local_weights(run.unet), strict=True):
            shadow.copy_(weight)
    average.optimization_step = step // EVERY if isinstance(average, PowerFunctionEMA) else step


def _check_tensors(folder: Path, state: TrainingState, network: UNet2DModel) -> None:
    """Raise a ValueError unless the tensors of a checkpoint are those of a network, and of its optimizer."""
    shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
    for tensors in (state.weights, *([] if state.ema is None else [state.ema])):
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        wrong = next((n for n in {**shapes, **found} if shapes.get(n) != found.get(n)), None)
        if wrong is not None:
            raise ValueError(
                f"{folder} is damaged: its {wrong!r} has shape {found.get(wrong)}, but the network's has "
                f"{shapes.get(wrong)}."
            )
    for name, value in state.averages.items():
        if tuple(value.shape) != shapes.get(name.partition("/")[2]):
            raise ValueError(f"{folder} is damaged: its average {name!r} fits no weight of the network.")
    for name, value in state.optimizer.items():
        parameter, _, _ = name.rpartition("/")
        if parameter not in shapes or (value.ndim and tuple(value.shape) != shapes[parameter]):
            raise ValueError(f"{folder} is damaged: its optimizer's {name!r} fits no weight of the network.")


def _order_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give moments the memory format of their weights, channels last perhaps: the fused AdamW assumes that."""
    for weight, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                values[key] = torch.empty_like(weight).copy_(value)


def compare(
    folder: Path, progress: dict[str, Any], config: TrainConfig, plan: Plan, label_names: list[str] | None
) -> list[str]:
    """What differs between a checkpoint and the run that resumes it, a line each.

    Raises:
        ValueError: if they can't be the same run.
    """
    before, now = progress["config"], json.loads(json.dumps(config.public()))
    changed = [k for k in now if k in before and k not in FREE_TO_CHANGE and before[k] != now[k]]
    fatal = [k for k in changed if k in MODEL_OPTIONS]
    if fatal:
        found = "; ".join(f"`{k}` is {now[k]!r}, but was {before[k]!r}" for k in fatal)
        raise ValueError(f"{folder} is of another model: {found}. Resume with the same options.")
    if progress["label_names"] != label_names:
        raise ValueError(
            f"{folder} was trained on the labels {progress['label_names']}, but the data has {label_names}: "
            "resume with the same data."
        )
    if progress["step"] > plan.max_steps and config.time_budget is None:
        raise ValueError(
            f"{folder} has {progress['step']} updates done, but the run ends after {plan.max_steps}: raise "
            f"--{'max_train_steps' if config.max_train_steps is not None else 'num_epochs'}."
        )
    notes = [f"Changed: {k} is {now[k]!r}, was {before[k]!r}." for k in changed]
    if progress["max_steps"] != plan.max_steps and "max_train_steps" not in changed and config.time_budget is None:
        notes.append(f"Changed: {plan.max_steps} updates, {progress['max_steps']} before; the learning rate follows.")
    if progress["num_images"] != plan.num_images and config.on_bad_image == "raise":
        notes.append(f"Changed: {plan.num_images} images, {progress['num_images']} before.")
    processes = progress["num_processes"]
    if processes != plan.num_processes:
        batch = before["train_batch_size"] * before["gradient_accumulation_steps"] * processes
        notes.append(
            f"Changed: {plan.num_processes} processes, {processes} before; {plan.global_batch} images per update, "
            f"{batch} before."
            + (" Adjust --gradient_accumulation_steps to keep it." if batch != plan.global_batch else "")
        )
    return notes
