"""Query attacks: what is nearly an image that was asked about before, and where that is kept."""
