"""Datasets: cards, raw sources, WebDataset shards, the manifest, and the way from a shard to a batch.

The writing half runs downwards: `sources.cards` (what a set is) -> `sources` (its raw samples, listed) -> `prepare.plan` (which
goes into which shard) -> `prepare.shard_writer` in a `process_pool` (tars, one record each in the `prepare.journal`) ->
`prepare.assemble` -> `format.manifest` and `format.index` (what exists, byte by byte). `prepare.adopt` makes the same for tars
that are there already; `verify` reads both. A dataset exists if and only if its `manifest.json` is there: it is written last.
"""
