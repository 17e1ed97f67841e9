"""Train a DDPM: `accelerate launch training/train.py` (see `--help`)."""

import sys
from pathlib import Path

from ddpm_hf.config import exit_with_error, parse_train_config


def main() -> None:
    """Read the options, then train. Foreseen errors end with one line."""
    try:
        config = parse_train_config(sys.argv[1:], default_preset=Path(__file__).parent / "configs" / "digits.yaml")
        from ddpm_hf.training import train  # after the options: --help and mistakes answer at once

        train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        exit_with_error(error)


if __name__ == "__main__":
    main()
