"""Time peers beside each other: they take turns, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


def time_in_turns(peers: Mapping[str, Callable[[], object]], repeats: int, calls: int = 1) -> dict[str, float]:
    """Median seconds of one call of each peer, over `repeats` rounds of `calls` calls; one more round goes before.

    The first of a round is another peer each time, since it pays for the caches that the last one filled.
    """
    names, seconds = list(peers), {name: [] for name in peers}
    for i in tqdm(range(repeats + 1), desc=", ".join(names), unit="round", leave=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            started = _now()
            for _ in range(calls):
                peers[name]()
            seconds[name].append((_now() - started) / calls)
    return {name: median(values[1:]) for name, values in seconds.items()}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(function: Callable[..., object], *arguments: Any) -> float:
    """MiB at the peak of a call in a process of its own: of the GPU where there is one, else of the whole process.

    `function` must be importable, as everything that another process is told to call.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_call_and_measure, (torch.get_num_threads(), function, *arguments))


def _call_and_measure(threads: int, function: Callable[..., object], *arguments: Any) -> float:
    torch.set_num_threads(threads)
    function(*arguments)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Not getrusage: its maximum is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of a call's matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def matmul_peak(dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product, the best of ten: what this machine can do at most."""
    device = best_device()
    n = size or (8192 if device.type == "cuda" else 2048)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(10):
        started = _now()
        torch.mm(a, b)
        seconds.append(_now() - started)
    return 2 * n**3 / min(seconds)


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, object]:
    """The hardware and the versions that a figure depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "diffusers", "numpy")},
    }


def write_results(file: Path, results: Mapping[str, object]) -> None:
    """The results as JSON, beside the machine that they are of."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(), **results}, indent=2, ensure_ascii=False)
    file.write_text(text + "\n", "utf-8")
    print(f"Results: {file}")


def markdown_table(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as a Markdown table, numbers to three digits."""

    def cell(value: object) -> str:
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(v) for v in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
