"""The commands of `normfree`: one module for each group holds its arguments and what it does."""
