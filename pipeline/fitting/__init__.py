"""What fits into a device's memory: what a step holds, and the largest micro-batch for which that is little enough."""
