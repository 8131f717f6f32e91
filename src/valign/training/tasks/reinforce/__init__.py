"""Reinforcement of chat models: groups of answers (GRPO, on trl), and PPO with a Lagrange multiplier."""
