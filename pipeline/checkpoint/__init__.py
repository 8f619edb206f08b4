"""Checkpoints: written commit last, verified when read, retained, pulled."""
