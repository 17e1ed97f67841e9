"""Models and files on disk, written atomically."""
