"""What a run will need, computed from the run: memory, communication, time, data, checkpoints; and loss from finished runs."""
