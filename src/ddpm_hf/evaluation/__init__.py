"""Measure a model: its likelihood, its calibration for few steps, the quality of its samples, and memorization."""
