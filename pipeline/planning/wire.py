"""How long collectives take: rings and trees over nodes whose devices share the node's network."""

import math
from dataclasses import dataclass

from pipeline.planning.collectives import Collective


@dataclass(frozen=True, kw_only=True)
class Wires:
    """Bytes a second in one direction, and seconds a hop."""

    nodes: int
    devices_per_node: int
    link_bytes_per_s: float
    """Of a device to the others of its node."""
    network_bytes_per_s: float
    """Of a node to the others, all its adapters together."""
    link_latency_s: float
    network_latency_s: float

    @property
    def world(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def bottleneck_bytes_per_s(self) -> float:
        """A ring passes each node's border once, and each link."""
        return self.link_bytes_per_s if self.nodes == 1 else min(self.link_bytes_per_s, self.network_bytes_per_s)

    def seconds(self, collective: Collective) -> float:
        """All calls of it in a step: the quicker of ring and (for an all-reduce) double binary tree.

        A ring of N sends 2 (N - 1) / N of the bytes and waits 2 (N - 1) hops, half of both to gather or to scatter; a tree
        sends as much and waits 2 log2(nodes) hops (Thakur et al. 2005; Sanders et al. 2009, as NCCL has them).
        """
        n = self.world
        if n == 1:
            return 0.0
        passes = 2 if collective.kind == "all_reduce" else 1
        sent = collective.total_bytes * passes * (n - 1) / n / self.bottleneck_bytes_per_s
        inside = self.nodes * (self.devices_per_node - 1) * self.link_latency_s
        ring_s = passes * (inside + (self.nodes if self.nodes > 1 else 0) * self.network_latency_s)
        if collective.kind in ("all_reduce", "broadcast"):
            deep = (self.devices_per_node - 1) * self.link_latency_s
            deep += math.ceil(math.log2(self.nodes)) * self.network_latency_s
            ring_s = min(ring_s, passes * deep)
        return sent + collective.calls * ring_s
