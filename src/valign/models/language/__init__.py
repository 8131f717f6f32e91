"""Chat models behind one protocol, and transformers models that read texts."""
