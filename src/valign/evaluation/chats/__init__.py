"""Chat models on fixed requests: their answers on disk, and what judges say of them."""
