"""Train the guard's head on labelled prompts and calibrate its thresholds."""
