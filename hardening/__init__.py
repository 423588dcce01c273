"""Train, purify, calibrate and evaluate a defended classifier (PyTorch)."""
