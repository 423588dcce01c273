"""Export a defended pipeline as one ONNX graph and archive it for TorchServe."""
