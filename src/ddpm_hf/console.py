"""A command in a terminal or a log: errors in one line, and no remarks of other packages that help nobody."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from types import FrameType
from typing import Any

SECONDS_PER_LINE = 10.0  # of other packages' progress, where there is no terminal

# By loggers of diffusers: what it says of the oldest repositories on the Hub, which load as they should, their pickled
# weights with `weights_only`; and of half precision, which CPUs have by now.
NOISE = {
    "diffusers.configuration_utils": (
        r"The config attributes \{('(timestep_values|tensor_format)': [^,{}]*(, )?)+\} were passed to"
    ),
    "diffusers.models.modeling_utils": (
        r"An error occurred while trying to fetch .* no file named diffusion_pytorch_model.safetensors"
        r"|Defaulting to unsafe serialization"
    ),
    "diffusers.pipelines.pipeline_utils": r"Pipelines loaded with `dtype=torch.float16` cannot run with `cpu`",
}


@contextmanager
def one_line_errors(again: str = "") -> Iterator[None]:
    r"""Within this context, foreseen errors end the process with one line and status 1, and signals with 128 + theirs.

    Letters that the encoding of stdout lacks, as cp1252 lacks β, are written as `\u03b2`, as stderr always does.

    Args:
        again: for a run that Ctrl-C or SIGTERM ends: how it resumes.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # in a notebook it is none
        sys.stdout.reconfigure(errors="backslashreplace")
    _quiet_others()
    try:
        with _signals_raise(again):
            yield
    except KeyboardInterrupt as error:
        signum = next((n for n in error.args if isinstance(n, int)), signal.SIGINT)
        _explain(signum, again)
        sys.exit(128 + signum)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None))
        sys.exit(f"error: {error}" + (". Free some space, then run the command again." if is_full else ""))


@contextmanager
def _signals_raise(again: str) -> Iterator[None]:
    """Within this context SIGTERM, too, is a KeyboardInterrupt, unless somebody else handles it.

    During imports a signal ends the process at once: many modules print a traceback of an exception, or swallow it.
    """
    process = os.getpid()

    def receive(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a copy, made to do a part of the work
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                _explain(signum, again)
                os._exit(128 + signum)
            frame = frame.f_back
        raise KeyboardInterrupt(signum)

    defaults: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    handled = [signum for signum, default in defaults.items() if signal.getsignal(signum) == default]
    if threading.current_thread() is not threading.main_thread():  # signals reach no other thread
        handled = []
    for signum in handled:
        signal.signal(signum, receive)
    try:
        yield
    finally:
        for signum in handled:
            signal.signal(signum, defaults[signum])


def _explain(signum: int, again: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # the first of several processes speaks for all
        name = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        print(f"\nInterrupted by {name}. What was saved before is unharmed. {again}", file=sys.stderr, flush=True)


def _quiet_others() -> None:
    """Other packages' bars seldom redraw where there is no terminal, once these are imported; `NOISE` is not logged."""
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS_PER_LINE))
    for name, noise in NOISE.items():
        pattern = re.compile(noise, re.DOTALL)
        logging.getLogger(name).addFilter(lambda record, p=pattern: p.match(record.getMessage()) is None)  # type: ignore[misc]
