"""Frozen encoders of texts and images: CLIP, MiniLM, and products in 8 bits."""
