"""Augmentation, a pure function of seeds and images."""
