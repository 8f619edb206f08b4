"""Trials of a sweep under Ray Tune."""
