"""Records on disk until a tracker has them, and the measurements of a machine."""
