"""What stands around a training loop in a process: the readers of its records."""
