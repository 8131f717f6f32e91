"""Train on pairs of a preferred and a rejected image."""
