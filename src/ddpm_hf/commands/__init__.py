"""What each command of `ddpm-hf` does, a file each. Imports that take seconds are made when they are needed."""
