"""Datasets: cards, raw sources, WebDataset shards, the manifest, and the way from a shard to a batch.

The writing half runs downwards: `cards` (what a set is) -> `sources` (its raw samples) -> `prepare` (check, shuffle,
split) -> `shards` (tars) -> `manifest` (what exists, byte by byte). A dataset exists if and only if its
`manifest.json` is there: it is written last.
"""
