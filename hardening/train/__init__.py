"""Data, and what makes weights of them."""
