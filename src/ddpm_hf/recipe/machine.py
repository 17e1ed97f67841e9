"""How fast this machine trains a network: measured by updates of it, in all processes of the run."""

from __future__ import annotations

import gc
import time
from statistics import fmean

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from ..config.training import IMAGE_MODES, TrainConfig
from ..diffusion.scheduling_ddpm_custom import DDPMSchedulerCustom
from ..distributed import TIMEOUT, Agreement
from ..training.averages import EVERY, build_averages
from ..training.losses import training_losses
from ..training.network import build_optimizer, build_unet
from ..training.performance import choose_channels_last, choose_precision
from ..training.setup import use_cores

MIN_UPDATES, MAX_UPDATES = 3, 30
BYTES_PER_PARAMETER = 24  # weights, gradient, two moments, an average, a copy for a checkpoint
MEMORY_SHARE = 0.7


def size_of_options(config: TrainConfig, classes: int | None) -> tuple[int, float]:
    """Parameters of a network, and the operations of one image in one pass, counted where nothing is computed."""
    with torch.device("meta"):
        unet = build_unet(config, classes)
        x = torch.empty(1, unet.config.in_channels, config.resolution, config.resolution)
        t = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            unet(x, t, class_labels=t if classes else None)
    return unet.num_parameters(), float(counter.get_total_flops())


class Machine:
    """The processes of a run, before it begins: the launcher's settings are its own."""

    def __init__(self) -> None:
        self.state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=TIMEOUT)
        self.agreement = Agreement(self.state.num_processes)
        self.is_main = self.state.is_main_process
        use_cores(self.state)

    def describe(self) -> str:
        """The devices, in a phrase."""
        device = self.state.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()}"
        threads = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        return f"{self.state.num_processes} × {name}{threads}"

    def has_memory_for(self, parameters: int) -> bool:
        """Whether weights, gradients, moments and averages take no more than most of the memory."""
        device = self.state.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        local = 1 if device.type == "cuda" else self.state.num_processes
        fits = BYTES_PER_PARAMETER * parameters * local < MEMORY_SHARE * free
        return not self.agreement.largest(int(not fits))

    def best_threads(self, config: TrainConfig, classes: int | None, seconds: float) -> tuple[float | None, int | None]:
        """`update_seconds` with all threads of this process or with one, whichever is less.

        Returns:
            The seconds, and the number of threads if it is not the usual one.
        """
        # Threads wait for each other at each layer: beside other programs, one was 3.6 times as fast as two (measured).
        threads = config.cpu_threads or torch.get_num_threads()
        choices = {threads} if config.cpu_threads or self.state.device.type != "cpu" else {threads, 1}
        measured: dict[int, float] = {}
        for number in sorted(choices, reverse=True):
            torch.set_num_threads(number)
            found = self.update_seconds(config, classes, seconds / len(choices))
            if found is None:
                break
            measured[number] = found
        torch.set_num_threads(threads)
        if not measured:
            return None, None
        best = min(measured, key=measured.__getitem__)
        return measured[best], config.cpu_threads if best == threads else best

    def update_seconds(self, config: TrainConfig, classes: int | None, seconds: float) -> float | None:
        """The mean time of an update of `config`'s network, in the slowest process; None where memory is too small.

        At least three updates are measured, and then as many as fit in `seconds`.
        """
        torch.manual_seed(config.seed)
        try:
            times = self._times(config, classes, seconds)
        except torch.OutOfMemoryError:
            times = []
        gc.collect()
        if self.state.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.agreement.largest(int(not times)):
            return None
        return self.agreement.largest_of_each(fmean(times))[0]

    def _times(self, config: TrainConfig, classes: int | None, seconds: float) -> list[float]:
        device = self.state.device
        unet = build_unet(config, classes).to(device).train()
        precision = choose_precision(device, unet.num_parameters()).value
        if config.mixed_precision not in (None, "auto"):
            precision = config.mixed_precision
        channels_last = config.channels_last == "yes" or (
            config.channels_last == "auto"
            and choose_channels_last(str(precision), device, unet.num_parameters()).value == "yes"
        )
        if channels_last:
            unet.to(memory_format=torch.channels_last)
        optimizer, (ema, others) = build_optimizer(config, unet), build_averages(config, unet)
        network: torch.nn.Module = unet
        if self.state.num_processes > 1:
            network = DistributedDataParallel(unet, device_ids=[device] if device.type == "cuda" else None)
        process = DDPMSchedulerCustom(config.ddpm_num_steps, beta_schedule=config.ddpm_beta_schedule).process
        size = (config.batch_size, IMAGE_MODES[str(config.image_mode)], config.resolution, config.resolution)
        x_0 = torch.rand(size, device=device) * 2 - 1
        labels = None if classes is None else torch.zeros(len(x_0), dtype=torch.long, device=device)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(str(precision))
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < MIN_UPDATES + 1 or self._has_time(began, seconds, len(times)):
            start = time.perf_counter()
            for _ in range(config.gradient_accumulation_steps):
                with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
                    losses, _ = training_losses(network, process, x_0, labels, config)
                losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            if ema is not None and (len(times) % EVERY == 0 or not config.ema_widths):
                for average in (ema, *others):
                    average.step(unet.parameters())
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return times[1:]  # the first one allocates; averages are seldom, so that their time is in few of them

    def _has_time(self, began: float, seconds: float, done: int) -> bool:
        is_over = time.perf_counter() - began > seconds or done > MAX_UPDATES
        return not self.agreement.largest(int(is_over))
