"""What a network is before it is trained: signal propagation, operations, memory, a summary."""
