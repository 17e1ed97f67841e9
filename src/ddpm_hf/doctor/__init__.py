"""What is wrong with a model: its files, its weights, its scheduler, and whether they belong together."""
