"""Rewriting: by the policy, by a chat model, and what a rewrite must keep."""
