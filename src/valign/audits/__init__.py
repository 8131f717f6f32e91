"""Before release: how brittle is a model's safety? Each audit measures, and leaves no weights behind."""
