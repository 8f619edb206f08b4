"""Images with a mask each, in folders as data sets are distributed."""
