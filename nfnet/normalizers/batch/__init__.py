"""Methods that use statistics over samples of a batch."""
