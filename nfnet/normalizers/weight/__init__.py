"""Methods that act on weights and branches and leave activations alone."""
