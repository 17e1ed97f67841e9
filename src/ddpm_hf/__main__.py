"""`python -m ddpm_hf` is `ddpm-hf`, for launchers: `accelerate launch -m ddpm_hf sample …`."""

from .cli import main

if __name__ == "__main__":
    main()
