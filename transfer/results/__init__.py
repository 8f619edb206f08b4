"""From the ledger to tables: scores, intervals, comparisons."""
