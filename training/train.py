"""Train a DDPM: `accelerate launch training/train.py` (see `--help`). Without a clone: `ddpm-hf train`.

In place of diffusers' `train_unconditional.py`, and like that it keeps all checkpoints.
"""

import sys

from ddpm_hf.training.__main__ import main

if __name__ == "__main__":
    main(sys.argv[1:], checkpoints_total_limit=0)
