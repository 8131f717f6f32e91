"""DRIFTCHECK, also DriftCaps: what a fine-tuning did to refusals, on one-line prompts from public sets (arXiv 2508.02079)."""
