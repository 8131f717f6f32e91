"""Text-to-image diffusion models: families, schedules, sampling, guidance, adapters, value encoders."""
