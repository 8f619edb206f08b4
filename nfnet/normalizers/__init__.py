"""Ways to train with, or without, a normaliser: one file each, found by `nfnet.normalizers.registry`."""
