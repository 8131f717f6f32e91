"""Ways to combine the U-Net's answers to several texts into one: negative prompt, Safe Latent Diffusion."""
