"""Train a DDPM: `accelerate launch training/train.py` (see `--help`)."""

import sys
from pathlib import Path

from ddpm_hf.config import parse_train_config
from ddpm_hf.options import exit_with_error


def main() -> None:
    """Read the options, then train. Foreseen errors end with one line; a signal with the status that shells expect."""
    try:
        config = parse_train_config(sys.argv[1:], default_preset=Path(__file__).parent / "configs" / "digits.yaml")
        from ddpm_hf.interruption import Interrupted  # after the options: --help and mistakes answer at once
        from ddpm_hf.training import train
    except (ValueError, OSError) as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        exit_with_error(error)
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.signum)
    except KeyboardInterrupt:
        print("\nInterrupted. What was saved before is unharmed.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
