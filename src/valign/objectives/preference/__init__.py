"""Objectives on pairs: one value per pair of a preferred and a rejected image."""
