"""Object detectors: scenes with boxes, networks that find them, attacks on these, and figures."""
