"""The image side of the guard: checks, regeneration in safer styles, value tokens."""
