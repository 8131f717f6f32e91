"""Objectives that keep a model's safety, or remove what it should not know, while it is fine-tuned."""
