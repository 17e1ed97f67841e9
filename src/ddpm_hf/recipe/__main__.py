"""One process of `ddpm-hf train`: with a time budget, it plans its run first."""

import atexit
import gc
import sys

from .command import main

if __name__ == "__main__":
    atexit.register(gc.freeze)  # as `ddpm-hf` does
    main(sys.argv[1:])
