"""Sample by any number of processes: `accelerate launch training/sample.py MODEL` is `ddpm-hf sample MODEL`."""

import sys

from ddpm_hf.cli import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
