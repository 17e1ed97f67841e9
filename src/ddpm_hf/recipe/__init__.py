"""From a set of images and a time to the options of a run."""
