"""A run on many machines: over ssh, under Slurm and Kubernetes, or as lines to type."""
