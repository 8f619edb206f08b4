"""Images to a trained checkpoint: shards, batches, engine, loop, checkpoints.

Imports `nfnet` only. Nothing heavy is imported here: `normfree --help` passes through this package.
"""
