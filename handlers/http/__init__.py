"""HTTP and gRPC of our own: requests to lanes, which batch them, and replies back."""
