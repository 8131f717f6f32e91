"""Labelled rows for fine-tuning: texts, images, images with captions."""
