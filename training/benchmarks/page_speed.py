"""From opening the page of `ddpm-hf demo --static` to its first image, in a browser that has one core.

    ddpm-hf demo ddpm-digits --static
    python training/benchmarks/page_speed.py ddpm-digits-demo

The page samples its default options as soon as it can: one image, 25 steps. Each visit is a new browser with nothing in
its cache; several folders take turns. The browser and the server of the files share the cores. "Processor" is the time
that they compute, which what else the machine does changes little.
"""

import argparse
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median

import psutil
from common.timing import markdown_table, write_results
from playwright.sync_api import sync_playwright
from tqdm import tqdm

LOADED = "() => document.querySelector('#status').textContent.startsWith('S')"
DONE = "() => / of .* steps in /.test(document.querySelector('#status').textContent)"


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder and reports nothing."""

    def log_message(self, *args: object) -> None:
        """Report nothing."""


def processor_seconds() -> float:
    """Of this process and all below it."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())


def visit(program: str, address: str) -> dict[str, float]:
    """Seconds from opening the page until the network is loaded, and until the first image is there."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.wait_for_timeout(1000)  # for what a browser does when it starts
        clocks: dict[str, Callable[[], float]] = {"s": time.perf_counter, "processor s": processor_seconds}
        started = {unit: clock() for unit, clock in clocks.items()}
        seconds = {}
        page.goto(address, wait_until="commit")
        for name, condition in (("network loaded", LOADED), ("first image", DONE)):
            page.wait_for_function(condition, polling=20)
            seconds |= {f"{name}, {unit}": clock() - started[unit] for unit, clock in clocks.items()}
        print(page.locator("#status").inner_text(), flush=True)
        browser.close()
    return seconds


def main() -> None:
    """Print the median of the visits to each folder and write `page_speed.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="as `ddpm-hf demo --static` writes them")
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=Path("bench-page"))
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    program = shutil.which("chromium") or shutil.which("google-chrome") or parser.error("there is no chromium")

    visits: dict[Path, list[dict[str, float]]] = {folder: [] for folder in options.folders}
    for folder in tqdm(options.folders * options.visits, unit="visit", leave=False):
        handler = functools.partial(QuietHandler, directory=str(folder))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            visits[folder].append(visit(program, f"http://127.0.0.1:{server.server_port}/"))
            server.shutdown()
    rows = [
        {"page": str(folder), **{name: median(v[name] for v in seen) for name in seen[0]}}
        for folder, seen in visits.items()
    ]
    print(markdown_table(rows))
    write_results(options.output_dir / "page_speed.json", {"page_speed": rows})


if __name__ == "__main__":
    main()
