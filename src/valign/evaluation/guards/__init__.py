"""How well a guard tells harmful prompts from harmless ones."""
