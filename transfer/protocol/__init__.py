"""What is measured: tasks, splits, methods."""
