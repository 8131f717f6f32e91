"""Benchmarks, sweeps and comparisons over seeds; what a user needs to align a model is in `valign.recipes`."""
