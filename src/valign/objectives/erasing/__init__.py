"""Objectives that remove a concept."""
