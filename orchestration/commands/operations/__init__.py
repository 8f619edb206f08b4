"""The commands for what people ask before, during and after a run: a module for each."""
