"""Methods that use statistics of each sample alone, or bound activations without any."""
