"""Stop signals, frozen ranks, the end of a process."""
