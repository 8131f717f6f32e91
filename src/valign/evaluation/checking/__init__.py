"""Was safety lost between two models? Paired outcomes, the decision, and its report."""
