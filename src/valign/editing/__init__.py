"""Closed-form edits of a model's weights: no training, delivered as the exact adapter that the edit is."""
