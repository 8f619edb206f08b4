"""A configuration of the user's, shrunk, on this machine, and everything that clusters do to a run."""
