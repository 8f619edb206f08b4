"""Datasets: cards, raw sources, WebDataset shards, the manifest, and the way from a shard to a batch.

The writing half runs downwards: `cards` (what a set is) -> `sources` (its raw samples, listed) -> `plan` (which goes into
which shard) -> `writing` in `workers` (tars, one record each in the `journal`) -> `assemble` -> `manifest` and `index`
(what exists, byte by byte). `adopt` makes the same for tars that are there already; `verify` and `overlap` read both. A
dataset exists if and only if its `manifest.json` is there: it is written last.
"""
