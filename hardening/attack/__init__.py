"""What looks for images that fool a model."""
