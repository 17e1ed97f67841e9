"""One training run, from options to an exported pipeline. README.md in this folder is a guided tour."""
