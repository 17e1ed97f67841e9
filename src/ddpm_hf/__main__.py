"""`python -m ddpm_hf` is `ddpm-hf`, for launchers: `accelerate launch -m ddpm_hf sample …`."""

import atexit
import gc
import os
import signal
import time

import psutil

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while `cli` is imported: no traceback

from .cli import main as run  # noqa: E402
from .recipe.command import STARTED, start_of_command  # noqa: E402


def main() -> None:
    """The command `ddpm-hf`. A time budget counts from the start of its process."""
    atexit.register(gc.freeze)  # else the last collections, of all that torch and others hold, take a second
    created = psutil.Process().create_time()
    os.environ[STARTED] = str(start_of_command(created, time.time(), time.process_time()))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
