"""The end of a scenario that a run did not survive."""


class Lost(Exception):
    """Why, in a sentence: what was expected of the run, and what it did."""
