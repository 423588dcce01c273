"""Query attacks: images nearly the same as earlier ones, and the stores that remember those."""
