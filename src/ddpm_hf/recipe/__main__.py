"""One process of `ddpm-hf train`: with a time budget, it plans its run first."""

import sys

from .command import main

if __name__ == "__main__":
    main(sys.argv[1:])
