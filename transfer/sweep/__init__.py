"""Trials: what is next, how one is run, what is written down."""
