"""Raw images to shards, restartable."""
