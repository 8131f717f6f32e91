"""Metrics and tables of the comparison of adapters."""
