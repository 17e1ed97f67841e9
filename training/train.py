"""Train a DDPM: `accelerate launch training/train.py` (see `--help`)."""

import sys

from ddpm_hf.config.parsing import exit_with_error, parse_train_config


def main() -> None:
    """Read the options, then train. Foreseen errors end with one line; a signal with the status that shells expect."""
    try:
        config = parse_train_config(sys.argv[1:])
        from ddpm_hf.training.interruption import Interrupted  # after the options: --help and mistakes answer at once
        from ddpm_hf.training.loop import train
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
