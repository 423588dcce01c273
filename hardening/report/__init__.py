"""What you read of a model: its card, tables, plots, the page."""
