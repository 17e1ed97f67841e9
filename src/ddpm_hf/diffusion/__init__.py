"""The paper, the scheduler, the pipeline: the files that are copied into every saved repository."""
