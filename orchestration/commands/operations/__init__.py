"""Commands for before, during and after a run."""
