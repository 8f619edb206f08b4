"""The format of a dataset: shards, index, manifest."""
