"""How fast a GPU samples and trains, beside diffusers' own. Parts of prove_gpu.py.

MFU is the share of the rate of the largest matrix product of that precision that this machine reaches (for float32 with
TF32, which convolutions use).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from common.gpu_trial import Trial
from common.timing import flops, matmul_peak, time_in_turns
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel

from ddpm_hf.training import loop

COMPILE_BEFORE = 60  # seconds after the start of a part: compilation takes up to two minutes


def _flops_per_image(trial: Trial) -> int:
    network, x = trial.network(), torch.zeros(1, *trial.image)
    return flops(lambda: network(x, 0))


def _peaks(trial: Trial) -> dict[str, float]:
    torch.backends.cuda.matmul.allow_tf32 = True
    size = 256 if trial.dry_run else None
    peaks = {"float32": matmul_peak(torch.float32, size), "bfloat16": matmul_peak(torch.bfloat16, size)}
    torch.backends.cuda.matmul.allow_tf32 = False
    return peaks


@torch.no_grad()
def _stock_chain(pipe: DDPMPipeline, trial: Trial, batch: int) -> None:
    """What diffusers' pipeline does, but for its last line, which can't make an array of bfloat16."""
    x = torch.randn(batch, *trial.image, device=trial.device, dtype=pipe.unet.dtype)
    pipe.scheduler.set_timesteps(trial.steps)
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    x.float().cpu()


def sampling_speed(trial: Trial) -> dict[str, Any]:
    """Steps per second at three batch sizes; compiled at the largest alone, for compilation takes a minute."""
    stock, half = trial.pipeline(DDPMPipeline), trial.pipeline(DDPMPipeline, torch.bfloat16)
    work, peaks, rows = _flops_per_image(trial), _peaks(trial), []
    batches = (1, 2) if trial.dry_run else (1, 16, 64)
    ours, fast = trial.pipeline(), trial.fast_pipeline(batches[-1], compiled=False)
    compiled = None if trial.dry_run else trial.fast_pipeline(batches[-1], compiled=True)
    for batch in batches:

        def sample(pipe: DDPMPipeline, batch: int = batch) -> Callable[[], object]:
            return lambda: pipe(batch, trial.generators(batch), trial.steps, "np")

        peers = {
            "stock, float32": lambda batch=batch: _stock_chain(stock, trial, batch),
            "stock, bfloat16": lambda batch=batch: _stock_chain(half, trial, batch),
            "ours, float32": sample(ours),
            "fast, bfloat16": sample(fast),
        }
        if compiled is not None and batch == batches[-1]:
            peers["fast and captured, bfloat16"] = sample(compiled)
        seconds = time_in_turns(peers, repeats=1 if trial.dry_run else 3)
        for name, taken in seconds.items():
            per_step = taken / trial.steps
            rows.append(
                {
                    "peer": name, "batch": batch, "ms_per_step": per_step * 1e3,
                    "images_per_second_of_1000_steps": batch / per_step / 1000,
                    "times_stock_float32": seconds["stock, float32"] / taken,
                    "mfu": work * batch / per_step / peaks[name.rpartition(" ")[2]],
                }
            )  # fmt: skip
    fastest = max(row["times_stock_float32"] for row in rows if row["batch"] == batches[-1])
    return {"ok": trial.dry_run or fastest > 1.2, "rows": rows}


def training_speed(trial: Trial) -> dict[str, Any]:
    """Images per second from the middle of a run to its end, data included; and whether the variants pay."""
    began, auto = time.perf_counter(), {"mixed_precision": "bf16"}
    runs: dict[str, dict[str, Any] | None] = {
        "stock, float32": None, "ours, float32": {}, "stock, bfloat16": None, "ours, bfloat16": auto,
        "ours, channels last, bfloat16": {**auto, "channels_last": "yes"},
        "ours, compiled, bfloat16": {**auto, "compile": "yes"},
    }  # fmt: skip
    if trial.dry_run:
        runs.pop("ours, compiled, bfloat16")
    work, peaks, rows = 3 * _flops_per_image(trial), _peaks(trial), []  # forward, and twice as much backward
    for batch in (4,) if trial.dry_run else (128, 512):
        stock: dict[str, float] = {}
        for name, options in runs.items():
            if "compiled" in name and (batch != 128 or time.perf_counter() - began > COMPILE_BEFORE):
                continue
            precision = name.rpartition(" ")[2]
            if not trial.dry_run:
                torch.cuda.reset_peak_memory_stats()
            updates = 6 if trial.dry_run else 24 if batch == 128 else 12
            if options is None:
                seconds = stock[precision] = _stock_seconds(trial, batch, updates, precision)
            else:
                seconds = _our_seconds(trial, batch, updates, options)
            rows.append(
                {
                    "peer": name, "batch": batch, "ms_per_update": seconds * 1e3, "images_per_second": batch / seconds,
                    "times_stock": stock[precision] / seconds, "mfu": work * batch / seconds / peaks[precision],
                    "peak_MiB": 0 if trial.dry_run else torch.cuda.max_memory_allocated() / 2**20,
                }
            )  # fmt: skip
    slowest = min(row["times_stock"] for row in rows if row["peer"] in ("ours, float32", "ours, bfloat16"))
    return {"ok": trial.dry_run or slowest > 0.95, "rows": rows}


def _our_seconds(trial: Trial, batch: int, updates: int, options: dict[str, Any]) -> float:
    marks: list[float] = []
    update_ema = loop.update_ema

    def mark(*arguments: Any) -> None:
        update_ema(*arguments)
        if len(marks) in (updates // 2, updates - 1):
            trial.sync()
        marks.append(time.perf_counter())

    with mock.patch.object(loop, "update_ema", mark):
        trial.train("speed", train_batch_size=batch, max_train_steps=updates, **options)
    return (marks[-1] - marks[updates // 2]) / (updates - 1 - updates // 2)


def _stock_seconds(trial: Trial, batch: int, updates: int, precision: str) -> float:
    """The arithmetic of an update of train_unconditional.py, on images that are decoded already."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16" if precision == "bfloat16" else "no", cpu=trial.dry_run)
    model = trial.network().train()
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler, images = DDPMScheduler(1000), torch.rand(batch, *trial.image)
    began = 0.0
    for update in range(updates):
        if update == updates // 2:
            trial.sync()
            began = time.perf_counter()
        clean = images.to(accelerator.device)
        noise = torch.randn(clean.shape, device=clean.device)
        t = torch.randint(0, 1000, (batch,), device=clean.device)
        noisy = scheduler.add_noise(clean, noise, t)
        with accelerator.accumulate(model):
            loss = torch.nn.functional.mse_loss(model(noisy, t).sample.float(), noise.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ema.step(model.parameters())
        loss.detach().item()
    trial.sync()
    return (time.perf_counter() - began) / (updates - updates // 2)
