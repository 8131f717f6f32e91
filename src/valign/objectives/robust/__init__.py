"""Losses that keep a predictor's answers the same when the condition of its images changes (CMA, arXiv 2303.05194)."""
