"""HTTP of our own: requests from a socket to lanes, which batch them, and replies back."""
