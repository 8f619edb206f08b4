"""The order of samples: which sample stands at which position."""
