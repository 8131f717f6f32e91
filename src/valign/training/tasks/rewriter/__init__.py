"""Training of the editing model: which words must change, and what may stand in their place."""
