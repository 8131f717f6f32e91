"""The HTML report: tables, plots and images in one file."""
