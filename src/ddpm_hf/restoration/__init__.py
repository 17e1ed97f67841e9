"""What an unconditional DDPM can do beyond sampling: restore, edit, invert and interpolate images."""
