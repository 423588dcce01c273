"""Start TorchServe, watch it, say when it really answers."""
