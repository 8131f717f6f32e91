"""Ways to combine the denoiser's answers to several texts into one: negative prompt, Safe Latent Diffusion."""
