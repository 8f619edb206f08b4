"""Networks by name or from a checkpoint, and what they say about images."""
