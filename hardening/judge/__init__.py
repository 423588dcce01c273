"""How good a model is, under attack and without."""
