"""Adapters and optimizers compared on tasks and seeds under one budget."""
