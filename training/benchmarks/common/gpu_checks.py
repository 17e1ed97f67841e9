"""What must be right on a GPU, each against an oracle. Parts of prove_gpu.py, which returns what they return."""

from __future__ import annotations

import itertools
import json
import re
import signal
import sys
import time
from collections import Counter
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import yaml
from common.gpu_trial import ROOT, Trial, differences, relative_error
from common.timing import matmul_peak
from diffusers import DDPMScheduler

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, bits_per_dim, calibrate
from ddpm_hf.config.training import TrainConfig
from ddpm_hf.storage.checkpoint import checkpoint_steps, read_progress
from ddpm_hf.training import loop, step
from ddpm_hf.training.environment import describe_environment
from ddpm_hf.training.network import build_unet

Result = dict[str, Any]


def machine(trial: Trial) -> Result:
    """What it is, and the largest rate of multiplications that it reaches, in TFLOP/s."""
    size = 256 if trial.dry_run else None
    torch.backends.cuda.matmul.allow_tf32 = True  # as convolutions use it
    peaks = {
        str(dtype).removeprefix("torch."): matmul_peak(dtype, size) / 1e12 for dtype in (torch.float32, torch.bfloat16)
    }
    return {"ok": True, "environment": describe_environment().splitlines(), "peak_tflops": peaks}


def steps_equal_those_of_a_cpu(trial: Trial) -> Result:
    """Every variance, eta and order, by timesteps of every kind, against the same trajectory on the CPU."""
    worst = {}
    variances = ("fixed_small", "fixed_large", "learned", "learned_range")
    for variance, eta, second_order in itertools.product(variances, (0.0, 0.5, 1.0), (False, True)):
        ends = [
            _trajectory(trial.device if kind else torch.device("cpu"), kind, variance, eta, second_order)
            for kind in ("", "int", "0-d", "per image")
        ]
        worst[f"{variance}, eta {eta}, order {1 + second_order}"] = max(relative_error(e, ends[0]) for e in ends[1:])
    largest = max(worst, key=worst.get)
    return {"ok": worst[largest] < 1e-5, "cases": len(worst), "largest_relative_error": worst[largest], "of": largest}


def _trajectory(device: torch.device, kind: str, variance: str, eta: float, second_order: bool) -> torch.Tensor:
    scheduler = DDPMSchedulerCustom(variance_type=variance)
    scheduler.set_timesteps(10, device=device if kind == "0-d" else None)
    generator, x, x_0 = torch.Generator().manual_seed(0), None, None
    for t in scheduler.timesteps:
        start, output, raw, noise = torch.randn(4, 4, 3, 8, 8, generator=generator).to(device)
        x = start if x is None else x
        if variance.startswith("learned"):
            output = torch.cat([output, raw.tanh()], dim=1)
        at = {"": lambda t=t: t, "int": lambda t=t: int(t), "0-d": lambda t=t: t}.get(
            kind, lambda t=t: t.to(device).repeat(4)
        )()
        previous = x_0 if second_order else None
        x, x_0 = scheduler.step(
            output, at, x, ddim_eta=eta, variance_noise=noise, previous_x_0=previous, return_dict=False
        )
    return x


def measurements_equal_those_of_a_cpu(trial: Trial) -> Result:
    """bits/dim and the calibration. Without TF32, which is no error of ours."""
    images = torch.randint(256, (16, *trial.image), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    scheduler = DDPMScheduler(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2")
    found = {}
    for device in (trial.device, torch.device("cpu")):
        pipe = DDPMPipelineCustom(trial.network().to(device), scheduler)
        bits = bits_per_dim(pipe, images, calls_per_image=3, show_progress=False).total
        found[str(device), len(found)] = (bits, calibrate(pipe, images, show_progress=False).x_0_error)
    (gpu, gpu_errors), (cpu, cpu_errors) = found.values() if len(found) == 2 else [*found.values()] * 2
    error = relative_error(gpu_errors, cpu_errors)
    return {"ok": abs(gpu / cpu - 1) < 1e-3 and error < 1e-3, "bits": gpu, "of_cpu": cpu, "calibration_error": error}


def no_step_waits(trial: Trial) -> Result:
    """From the end of the first step to that of the last but one nothing waits; and the calls that a profiler sees."""
    pipes = {"ours": trial.pipeline(), "fast": trial.fast_pipeline(trial.batch, compiled=False)}
    outcomes, calls = {}, {}
    for (name, pipe), noise_from in itertools.product(pipes.items(), ("cpu", trial.device.type)):

        def watch(pipeline: object, i: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
            trial.forbid_waits(i < trial.steps - 2)
            return tensors

        case = f"{name}, noise from the {noise_from}"
        try:
            generators = trial.generators(trial.batch, noise_from)
            pipe(trial.batch, generators, trial.steps, "latent", callback_on_step_end=watch)
            outcomes[case] = "no waits"
        except RuntimeError as error:
            outcomes[case] = str(error)[:300]
        finally:
            trial.forbid_waits(False)
        if not trial.dry_run:
            with torch.profiler.profile() as profile:
                pipe(trial.batch, generators, 10, "latent")
            counts = Counter(event.name for event in profile.events() if event.name.startswith("cuda"))
            calls[case] = {k: v for k, v in counts.items() if re.search("Synchronize|HostAlloc|LaunchKernel", k)}
    return {"ok": set(outcomes.values()) == {"no waits"}, **outcomes, "calls_in_10_steps": calls}


def no_update_waits(trial: Trial) -> Result:
    """Every update after the first, from its batch to its moving average, in every precision."""
    outcomes = {}
    begin, end, done = loop.accumulate_gradients, loop.update_ema, [0]

    def watched_begin(*arguments: Any) -> None:
        trial.forbid_waits(done[0] > 0)
        begin(*arguments)

    def watched_end(*arguments: Any) -> None:
        end(*arguments)
        trial.forbid_waits(False)
        done[0] += 1

    with (
        mock.patch.object(loop, "accumulate_gradients", watched_begin),
        mock.patch.object(loop, "update_ema", watched_end),
    ):
        for precision in ("no", "bf16") if trial.dry_run else ("no", "bf16", "fp16"):
            done[0] = 0
            try:
                trial.train(precision, mixed_precision=precision)
                outcomes[precision] = "no waits"
            except RuntimeError as error:
                outcomes[precision] = str(error)[:300]
            finally:
                trial.forbid_waits(False)
    return {"ok": set(outcomes.values()) == {"no waits"}, **outcomes}


def half_precision_trains(trial: Trial) -> Result:
    """Losses as in float32; overflows of fp16 cost an update each and nothing else; resumed, bit for bit the same."""
    updates, results = (8 if trial.dry_run else 100), {}
    losses = {}
    for precision in ("no", "bf16") if trial.dry_run else ("no", "bf16", "fp16"):
        trial.train(f"losses-{precision}", mixed_precision=precision, max_train_steps=updates)
        log = (trial.folder / f"losses-{precision}" / "logs" / "train.jsonl").read_text().splitlines()
        losses[precision] = json.loads(log[-1])["loss"]
    close = all(abs(loss / losses["no"] - 1) < 0.1 for loss in losses.values())
    results["losses"] = losses
    if trial.dry_run:  # a CPU has no fp16
        return {"ok": close, **results}

    torch.use_deterministic_algorithms(True, warn_only=True)
    options = {"mixed_precision": "fp16", "max_train_steps": 12, "checkpointing_steps": 4}
    with _overflows(4, 7, 12):
        whole = trial.train("fp16", **options)
    with _overflows(7 - 4, 12 - 4):
        resumed = trial.train("again", resume_from_checkpoint=str(trial.folder / "fp16" / "checkpoint-4"), **options)
    progress = [read_progress(trial.folder / name / "checkpoint-12") for name in ("fp16", "again")]
    different, largest = differences(whole, resumed)
    steps = {float(v) for k, v in whole.items() if k.endswith("/step")}
    kept = (
        checkpoint_steps(trial.folder / "fp16") == [4, 8, 12] and (trial.folder / "fp16" / "model_index.json").is_file()
    )
    scalers = [p["grad_scaler"] for p in progress]
    ok = close and kept and not different and max(steps) <= 9 and scalers[0] == scalers[1]
    return {
        "ok": ok,
        **results,
        "optimizer_steps": sorted(steps),
        "scaler": scalers[0],
        "different": different,
        "largest": largest,
    }


def _overflows(*updates: int) -> Any:
    """Within this context, the losses of these updates are infinite."""
    losses_of, count = step.training_losses, itertools.count(1)

    def training_losses(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        losses, t = losses_of(*arguments)
        return (losses * float("inf") if next(count) in updates else losses), t

    return mock.patch.object(step, "training_losses", training_losses)


def killed_and_resumed_is_bit_equal(trial: Trial) -> Result:
    """A run that is killed at a random moment and resumed, against one that is not; deterministic algorithms."""
    last, every = (12, 4) if trial.dry_run else (60, 20)
    precision = "no" if trial.dry_run else "bf16"
    options = {"max_train_steps": last, "checkpointing_steps": every, "mixed_precision": precision}
    trial.finish(trial.start(trial.options("whole", **options)))
    killed = trial.start(trial.options("killed", **options))
    while not (trial.folder / "killed" / f"checkpoint-{every}").is_dir() and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    rest = {"resume_from_checkpoint": "latest", "overwrite_output_dir": False}
    trial.finish(trial.start(trial.options("killed", **options, **rest)))
    different, largest = differences(trial.state("whole", last), trial.state("killed", last))
    return {"ok": not different, "different_tensors": different, "largest_difference": largest}


def memory_is_found_and_kept(trial: Trial) -> Result:
    """Checkpointed gradients are the same and smaller in memory; `auto` finds what fits, and the next size does not."""
    size = trial.image[1]
    peaks, gradients = {}, {}
    torch.use_deterministic_algorithms(True, warn_only=True)
    for again in (False, True):
        options = trial.options("gradients", gradient_checkpointing=again)
        torch.manual_seed(0)
        unet = build_unet(TrainConfig(**options)).to(trial.device).train()
        x = torch.randn(trial.batch, 3, size, size, device=trial.device)
        torch.manual_seed(1)
        if not trial.dry_run:
            torch.cuda.reset_peak_memory_stats()
        unet(x, torch.zeros(trial.batch, dtype=torch.long, device=trial.device)).sample.square().mean().backward()
        gradients[again] = [p.grad.cpu() for p in unet.parameters()]
        peaks[again] = 0 if trial.dry_run else torch.cuda.max_memory_allocated() / 2**20
    error = max(relative_error(a, b) for a, b in zip(*gradients.values(), strict=True) if float(b.norm()) > 0)
    torch.use_deterministic_algorithms(False)
    results: Result = {"gradient_error": error, "peak_MiB": list(peaks.values())}
    if trial.dry_run:
        return {"ok": error < 1e-6, **results}
    torch.cuda.set_per_process_memory_fraction(12 * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    trial.train("auto", train_batch_size="auto", global_batch_size=1024, max_train_steps=2)
    config = read_progress(trial.folder / "auto" / "checkpoint-2")["config"]
    found = config["train_batch_size"]
    message = "it fits"
    try:
        trial.train("more", train_batch_size=1024, max_train_steps=1)
    except MemoryError as failure:
        message = str(failure)
    ok = error < 1e-3 and peaks[True] < 0.8 * peaks[False] and found < 1024 and "--gradient_checkpointing" in message
    return {
        "ok": ok,
        **results,
        "found": found,
        "accumulation": config["gradient_accumulation_steps"],
        "message": message,
    }


def sharded_equals_replicated(trial: Trial) -> Result:
    """FSDP2 against DDP, with previews and validation: a group of one GPU, or in a dry run of two CPU processes."""
    count = "2" if trial.dry_run else "1"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", count)
    file = yaml.safe_load((ROOT / "training" / "accelerate" / "fsdp.yaml").read_text("utf-8"))["fsdp_config"]
    environment = {
        key.replace("_layer_cls", "_cls").upper(): str(value).lower() if isinstance(value, bool) else str(value)
        for key, value in file.items()
    }
    sharded = {"ACCELERATE_USE_FSDP": "true", **environment}
    on_cpu = (str(ROOT / "tests" / "support" / "fsdp_on_cpu.py"),) if trial.dry_run else ()
    updates = 4 if trial.dry_run else 20
    extra = {
        "save_images_steps": updates // 2,
        "eval_steps": updates // 2,
        "eval_images": 16,
        "max_train_steps": updates,
    }
    states = {}
    for name, more in (("ddp", {}), ("fsdp", sharded)):
        options = trial.options(name, **extra, unet={**trial.options(name)["unet"], "dropout": 0.0})
        trial.finish(trial.start(options, (*launcher, *on_cpu), **more))
        states[name] = trial.state(name, updates)
    names = [name for name in states["ddp"] if "optimizer" not in name]
    ddp, fsdp = (torch.cat([states[kind][name].flatten() for name in names]) for kind in ("ddp", "fsdp"))
    error = relative_error(fsdp, ddp)
    return {"ok": error < 1e-5, "relative_error": error, "largest_difference": float((ddp - fsdp).abs().max())}


def captured_network_is_right(trial: Trial) -> Result:
    """The compiled network, a CUDA graph, against the eager one; replays overwrite nothing that a trajectory keeps."""
    patched = nullcontext()
    if trial.dry_run:  # all of torch.compile but the generation of code
        torch_compile = torch.compile
        patched = mock.patch.object(
            torch, "compile", lambda module, mode=None, **options: torch_compile(module, backend="aot_eager", **options)
        )
    with patched, torch.no_grad():
        pipe = trial.fast_pipeline(trial.batch, compiled=True)
        captured, eager = pipe._fast_network, trial.fast_pipeline(trial.batch, compiled=False)._fast_network
        exact, generator = trial.pipeline().unet, torch.Generator().manual_seed(1)
        errors: dict[str, list[float]] = {"captured": [], "half precision": []}
        is_repeatable = True
        for t in range(0, 1000, 111):
            x, at = torch.randn(trial.batch, *trial.image, generator=generator).to(trial.device), torch.tensor(t)
            at = at.to(trial.device)
            output = captured(x, at)[0].float().clone()
            errors["captured"].append(relative_error(output, eager(x, at)[0].float()))
            errors["half precision"].append(relative_error(output, exact(x, at, return_dict=False)[0]))
            is_repeatable &= torch.equal(captured(x, at)[0].float(), output)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(pipeline: object, i: int, t: object, tensors: dict[str, Any]) -> dict[str, Any]:
            kept.extend((tensor, tensor.clone()) for tensor in tensors.values())
            return tensors

        names = ["latents", "pred_original_sample"]
        pipe(
            trial.batch, trial.generators(trial.batch), trial.steps, "latent", solver_order=2,
            callback_on_step_end=keep, callback_on_step_end_tensor_inputs=names,
        )  # fmt: skip
        is_intact = all(torch.equal(tensor, copy) for tensor, copy in kept)
    skipped = int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])
    worst = {name: max(values) for name, values in errors.items()}
    ok = is_intact and is_repeatable and not skipped and max(worst.values()) < 2e-2
    return {"ok": ok, "errors": worst, "intact": is_intact, "repeatable": is_repeatable, "skipped_graphs": skipped}
