"""What is trained, calibrated and exported: networks, detectors, the pipeline of both."""
