"""From positions in the order to batches of pixels."""
