"""The trained level of the guard."""
