"""What is told of a model: its card, tables, plots, the page."""
