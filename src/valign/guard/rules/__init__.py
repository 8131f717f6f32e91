"""The guard's rules: block rules, word lists, scripts, norms, intention."""
