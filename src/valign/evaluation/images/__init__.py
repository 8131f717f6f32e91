"""Metrics of generated images: harm, fidelity, drift, FID, CLIPScore, bias, toxicity."""
