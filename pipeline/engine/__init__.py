"""DeepSpeed's engine, clipping over its fragments, the update."""
