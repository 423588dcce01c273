"""Export a defended pipeline as one ONNX graph, and pack it as one archive."""
