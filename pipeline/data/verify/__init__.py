"""Checks of datasets: every byte, labels, duplicates."""
