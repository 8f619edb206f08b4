"""A few steps of a run looked at closely: a trace of torch's profiler in which our phases have names."""
