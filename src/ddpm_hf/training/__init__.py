"""One training run, from options to an exported pipeline."""
