"""One process of a training run: `accelerate launch -m ddpm_hf.training …`. `ddpm-hf train` starts all of them."""

import sys
from collections.abc import Sequence
from typing import Any

from ..config.parsing import parse_train_config
from ..console import one_line_errors


def main(argv: Sequence[str], **defaults: Any) -> None:
    """Read the options, then train. Foreseen errors end with one line; a signal with the status that shells expect.

    Args:
        argv: the command line.
        defaults: of options, instead of those of `TrainConfig`.
    """
    with one_line_errors("Resume with --resume_from_checkpoint latest."):
        config = parse_train_config(argv, **defaults)
        from .interruption import Interrupted  # after the options: --help and mistakes answer at once
        from .loop import train

        try:
            train(config)
        except Interrupted as interrupted:
            sys.exit(128 + interrupted.signum)


if __name__ == "__main__":
    main(sys.argv[1:])
