"""A checkpoint -> numbers on tasks: suites, protocols, probes, fine-tuning, and the ledger of what has been run."""
