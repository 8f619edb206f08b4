"""Starting training processes: on one machine here; torch's launcher supervises them."""
