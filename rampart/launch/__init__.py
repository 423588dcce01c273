"""Start a server, TorchServe or our own, watch it, say when it really answers."""
