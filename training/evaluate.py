"""Evaluate by any number of processes: `accelerate launch training/evaluate.py MODEL` is `ddpm-hf evaluate MODEL`."""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
