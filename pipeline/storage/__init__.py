"""Files and objects, local or in a store."""
