"""`python -m ddpm_hf` is `ddpm-hf`, for launchers: `accelerate launch -m ddpm_hf sample …`."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while `cli` is imported: no traceback

from .cli import main as run  # noqa: E402


def main() -> None:
    """The command `ddpm-hf`."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
