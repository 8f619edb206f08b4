"""The files inside a folder, a tar or a zip: found, and read in place."""
