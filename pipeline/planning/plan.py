"""A Run and machines -> what it will need, and what holds it up."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.fitting.memory import Memory, memory
from pipeline.planning.assumptions import Assumption
from pipeline.planning.collectives import Collective, step_collectives
from pipeline.planning.devices import Device
from pipeline.planning.planned_network import Network
from pipeline.planning.upkeep import Upkeep
from pipeline.planning.wire import Wires
from pipeline.training.run import Run


@dataclass(frozen=True)
class Plan:
    """Of a run on `nodes` nodes of `devices_per_node` devices."""

    run: Run
    network: Network
    device: Device
    assumed: Mapping[str, Assumption]
    nodes: int
    devices_per_node: int
    num_samples: int
    """Of the training split, different ones."""
    network_bytes_per_s: float
    loss: float = 0.01
    """That saves and failures may cost, as a share."""
    price: float | None = None
    """Of a device-hour."""
    step_s: float | None = None
    """Measured: forward, backward and update of a micro-batch and its share of the step, on this device; None: computed."""

    def value(self, name: str) -> float:
        return self.assumed[name].value

    @property
    def world(self) -> int:
        return self.nodes * self.devices_per_node

    @cached_property
    def batches(self) -> tuple[int, int]:
        """(micro-batch, accumulation): the run's micro-batch, or the largest part of it that divides a device's share.

        Raises:
            UserError: the devices do not divide the global batch.
        """
        share = self.run.global_batch // self.world
        asked = self.run.micro_batch
        micro = self.largest_micro_batch() if asked == "auto" else math.gcd(asked, share) if asked else 0
        return replace(self.run, micro_batch=micro).batch_plan(self.world)

    @property
    def total_steps(self) -> int:
        return self.run.duration.steps(
            samples_per_epoch=self.num_samples * self.run.data.repeats, global_batch=self.run.global_batch
        )

    # --- memory ------------------------------------------------------------------------------------------------------

    def memory(
        self, *, stage: int | None = None, micro_batch: int | None = None, checkpointing: float | None = None
    ) -> Memory | None:
        """As the run has it, or otherwise (`checkpointing`: the share of blocks that are computed again); None where the network
        cannot recompute its blocks."""
        profile = self.network.at(*(self.run.engine.recomputed if checkpointing is None else (checkpointing, 1)))
        micro = micro_batch or self.batches[0]
        if profile is None:
            return None
        return memory(
            self.network.parameters,
            profile,
            stage=self.run.engine.zero_stage if stage is None else stage,
            world=self.world,
            micro_batch=micro,
            accumulation=self.run.global_batch // self.world // micro,
            averages=self.run.optim.ema_decay is not None,
            num_moments=len(self.run.optim.moments),
            is_cpu=self.device.is_cpu,
        )

    def used(self, held: Memory) -> float:
        """Bytes of the device with all that comes on top of tensors."""
        fixed = 1e9 * (self.value("context_gb") + self.value("workspace_gb"))
        return held.total * (1 + self.value("fragmentation")) + fixed

    @property
    def room(self) -> float:
        """Bytes of a device; of a process on a CPU its part of the machine's memory."""
        return 1e9 * self.value("device_memory_gb") / (self.devices_per_node if self.device.is_cpu else 1)

    def fits(self, held: Memory) -> bool:
        return self.used(held) <= self.room

    @cached_property
    def least_checkpointed(self) -> int | None:
        """Of the network's blocks, how many must be computed again for the run to fit as it is otherwise; None where none need
        be, or where all are not enough, or a part cannot be."""

        def is_enough(num: int) -> bool:
            held = self.memory(checkpointing=num / self.network.num_blocks)
            return held is not None and self.fits(held)

        num = self.network.num_blocks
        if not num or is_enough(0) or not is_enough(num):
            return None
        return bisect_left(range(1, num + 1), True, key=is_enough) + 1

    def largest_micro_batch(self, *, stage: int | None = None, checkpointing: float | None = None) -> int:
        """Of those that divide a rank's share of the batch; 0 if not even one image fits."""
        share = self.run.global_batch // self.world
        for micro in (n for n in range(share, 0, -1) if share % n == 0):
            held = self.memory(stage=stage, micro_batch=micro, checkpointing=checkpointing)
            if held is not None and self.fits(held):
                return micro
        return 0

    # --- time --------------------------------------------------------------------------------------------------------

    @property
    def multiply_adds(self) -> float:
        """Of one image in a step, forward and backward; SAM's ascent included."""
        profile = self.network.at(*self.run.engine.recomputed) or self.network.profile
        ascent = self.run.optim.sam_share if self.run.optim.sam_rho > 0 else 0.0
        return profile.multiply_adds + ascent * self.network.profile.multiply_adds

    @property
    def compute_s(self) -> float:
        """Of a step, forward and backward passes of a rank's share and its update."""
        if self.step_s is not None:
            return self.step_s
        rate = self.device.flops(self.run.engine) * self.value("compute_share")
        share = self.run.global_batch / self.world
        held = self.network.parameters.share(self.run.engine.zero_stage, self.world)
        update_s = 8 * held / (1e9 * self.value("memory_gb_per_s"))  # four states read, three written, sums of squares
        return 2 * self.multiply_adds * share / rate + update_s

    def collectives(self, stage: int | None = None) -> list[Collective]:
        return step_collectives(
            self.network.parameters,
            stage=self.run.engine.zero_stage if stage is None else stage,
            world=self.world,
            accumulation=self.batches[1],
        )

    @property
    def wires(self) -> Wires:
        share = self.value("link_share")
        return Wires(
            nodes=self.nodes,
            devices_per_node=self.devices_per_node,
            link_bytes_per_s=1e9 * self.value("link_gb_per_s") * share,
            network_bytes_per_s=self.network_bytes_per_s * share,
            link_latency_s=1e-6 * self.value("node_latency_us"),
            network_latency_s=1e-6 * self.value("network_latency_us"),
        )

    def communication_s(self, stage: int | None = None) -> float:
        return sum(map(self.wires.seconds, self.collectives(stage))) * (1 - self.value("overlap"))

    @property
    def data_s(self) -> dict[str, float]:
        """What each part of the data's way would need for a step by itself, all nodes at work."""
        images = self.run.global_batch / self.nodes
        num_bytes = images * self.value("bytes_per_image")
        cores = self.value("cores_per_device") * self.devices_per_node
        per_core = self.value("decode_images_per_s") * min(1.0, (224 / self.run.augment.image_px) ** 2)
        return {
            "decoding": images / (cores * per_core),
            "reading from the bucket": num_bytes / (1e9 * self.value("bucket_gb_per_s")),
        }

    @property
    def step_parts_s(self) -> dict[str, float]:
        return {"computing": self.compute_s, "communication": self.communication_s(), **self.data_s}

    @property
    def whole_step_s(self) -> float:
        """Data come beside computing, communication after it."""
        return max(self.compute_s + self.communication_s(), *self.data_s.values())

    # --- upkeep ------------------------------------------------------------------------------------------------------

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, what the optimiser keeps of them, averages, fp32."""
        return self.network.parameters.num_bytes * self.run.optim.num_states

    @property
    def writers(self) -> tuple[int, int]:
        """(ranks, nodes) that write a checkpoint: without ZeRO rank 0 alone."""
        return (1, 1) if self.run.engine.zero_stage == 0 else (self.world, self.nodes)

    def save_s(self, gb_per_s: float) -> float:
        """In the background, at this rate for each writing node."""
        return self.checkpoint_bytes / self.writers[1] / (1e9 * gb_per_s)

    @property
    def upkeep(self) -> Upkeep:
        per_s = self.value("failures_per_device_day") * self.world / 86400
        return Upkeep(
            cost_s=self.checkpoint_bytes / self.writers[0] / (1e9 * self.value("copy_gb_per_s")),
            mean_time_s=1 / per_s if per_s else math.inf,
            restart_s=self.value("restart_s"),
        )

    @property
    def save_every_s(self) -> float:
        """Daly's, but not more often than the bucket takes them, and within the run."""
        best_s = max(self.upkeep.best_s(), self.save_s(self.value("bucket_gb_per_s")))
        return min(best_s, self.training_s)

    @property
    def lost_share(self) -> float:
        return self.upkeep.lost_share(self.save_every_s)

    # --- the whole ---------------------------------------------------------------------------------------------------

    @property
    def training_s(self) -> float:
        return self.total_steps * self.whole_step_s

    @property
    def wall_s(self) -> float:
        """With saves, failures and what is done again."""
        return self.training_s / max(1 - self.lost_share, 1e-3)

    @property
    def device_hours(self) -> float:
        return self.wall_s / 3600 * self.world

    @property
    def kwh(self) -> float:
        return self.device_hours * self.value("watts") / 1000

    @property
    def bottleneck(self) -> str:
        """One sentence."""
        held = self.memory()
        if held is not None and not self.fits(held):
            largest = self.largest_micro_batch()
            return (
                f"memory: a micro-batch of {self.batches[0]} needs {self.used(held) / 1e9:.1f} GB of the device's "
                f"{self.room / 1e9:.1f}; "
                + (f"set micro_batch to {largest}" if largest else "raise engine.zero_stage or use more devices")
            )
        part, seconds = max(self.step_parts_s.items(), key=lambda item: item[1])
        advice = {
            "computing": "devices of a higher rate, or more of them, make it faster",
            "communication": f"a faster network than {self.network_bytes_per_s / 1e9:.3g} GB/s a node, or a larger batch, helps",
            "decoding": "more cores a device, or images stored smaller, help",
            "reading from the bucket": "a local copy or a faster connection to the bucket helps",
        }[part]
        return f"{part} takes {seconds / self.whole_step_s:.0%} of a step; {advice}"


def plans(first: Plan, nodes: Sequence[int]) -> list[Plan]:
    """The same on other numbers of nodes."""
    return [replace(first, nodes=n) for n in nodes]
