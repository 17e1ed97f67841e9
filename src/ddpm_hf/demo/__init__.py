"""Demos of a model: an app on a server, and a page that samples in the browser."""
