"""N images by any number of processes."""
