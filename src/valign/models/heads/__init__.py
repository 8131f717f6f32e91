"""Heads on encoders: classification and regression tasks, and the guard's prompt head."""
