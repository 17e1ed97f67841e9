"""Prove that everything that needs a GPU works on this machine, in one command and ten minutes:

    python training/benchmarks/prove_gpu.py --output gpu.json        # --dry_run: the same on a CPU, made tiny

Each part runs in a process of its own, has an oracle, and is written down as soon as it ends: what hangs or crashes
costs its own result alone. A part that no time is left for is skipped, and says so. `--only PART …` runs some of them.
The exit status is 1 if any part fails. Parts are functions of `common/gpu_checks.py` (what is right) and
`common/gpu_speed.py` (what is fast); in a dry run no speed means anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# In this order, and the seconds after which a part is given up: about twice what it should take.
PARTS = {
    "machine": 60,
    "steps_equal_those_of_a_cpu": 60,
    "measurements_equal_those_of_a_cpu": 90,
    "no_step_waits": 90,
    "no_update_waits": 120,
    "half_precision_trains": 120,
    "killed_and_resumed_is_bit_equal": 180,
    "memory_is_found_and_kept": 120,
    "sharded_equals_replicated": 180,
    "captured_network_is_right": 240,
    "sampling_speed": 240,
    "training_speed": 240,
}
IS_SHORT_BELOW = 20  # seconds: no part is begun with less


def run_part(name: str, dry_run: bool) -> dict[str, Any]:
    """The result of one part, in this process."""
    from common import gpu_checks, gpu_speed, gpu_trial

    trial = gpu_trial.Trial(dry_run)
    part = getattr(gpu_checks, name, None) or getattr(gpu_speed, name)
    try:
        return part(trial)
    except Exception as error:
        return {
            "ok": False,
            "error": f"{type(error).__name__}: {error}"[:1000],
            "at": traceback.format_exc()[-1500:],
        }
    finally:
        trial.close()


def run_apart(name: str, dry_run: bool, seconds: float) -> dict[str, Any]:
    """The result of one part, in a process of its own that has so many seconds."""
    command = [sys.executable, __file__, "--part", name, *(["--dry_run"] if dry_run else [])]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"given up after {seconds:.0f} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return json.loads(last)
    except json.JSONDecodeError:
        return {"ok": False, "error": f"ended with status {done.returncode}", "output": done.stdout[-1000:]}


def main() -> None:
    """Run the parts one after the other, and write what they found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=590, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(run_part(options.part, options.dry_run)), flush=True)
        return

    began, results = time.monotonic(), {}
    for name in options.only:
        started = time.monotonic()
        left = options.seconds - (started - began)
        if left < IS_SHORT_BELOW:
            results[name] = {"ok": None, "error": "no time was left"}
        else:
            results[name] = run_apart(name, options.dry_run, min(left, PARTS[name]))
        results[name]["seconds"] = round(time.monotonic() - started, 1)
        options.output.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", "utf-8")
        word = {True: "ok", False: "FAILED", None: "skipped"}[results[name]["ok"]]
        print(f"{word:8}{name}, {results[name]['seconds']} s  {results[name].get('error', '')}", flush=True)
    failed = [name for name, result in results.items() if result["ok"] is False]
    print(f"{len(failed)} of {len(results)} parts failed; the figures are in {options.output}.")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
