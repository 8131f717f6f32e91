"""Prompts: readers of every layout, pairs, sources, labelled prompts, disguises."""
