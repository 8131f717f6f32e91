"""Embeddings in hyperbolic space: the Lorentz model's maps, the scalars that a CLIP learns with it, and the way to its root."""
