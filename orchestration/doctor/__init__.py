"""Is everything fit: hosts, the network between them, disks, buckets, the tracker, the engine. What differs, and what to do."""
