"""A command in a terminal or a log: errors in one line, and no remarks of other packages that help nobody."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

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
def one_line_errors() -> Iterator[None]:
    r"""Within this context, foreseen errors end the process with one line and status 1, and Ctrl-C with status 130.

    Letters that the encoding of stdout lacks, as cp1252 lacks β, are written as `\u03b2`, as stderr always does.
    """
    if isinstance(sys.stdout, TextIOWrapper):  # in a notebook it is none
        sys.stdout.reconfigure(errors="backslashreplace")
    _quiet_others()
    try:
        yield
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nInterrupted. What was saved before is unharmed.", file=sys.stderr)
        sys.exit(130)


def _quiet_others() -> None:
    """Other packages' bars seldom redraw where there is no terminal, once these are imported; `NOISE` is not logged."""
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", str(SECONDS_PER_LINE))
    for name, noise in NOISE.items():
        pattern = re.compile(noise, re.DOTALL)
        logging.getLogger(name).addFilter(lambda record, p=pattern: p.match(record.getMessage()) is None)  # type: ignore[misc]
