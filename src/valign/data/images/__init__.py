"""Image pairs, value images, and their cached latents."""
