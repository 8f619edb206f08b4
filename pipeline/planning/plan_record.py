"""A plan as plain containers, for JSON: bytes, seconds."""

import math
from typing import Any

from pipeline.planning.plan import Plan

STAGES = (0, 1, 2, 3)


def to_dict(plan: Plan) -> dict[str, Any]:
    """Plain containers; bytes, seconds."""
    micro, accumulation = plan.batches
    held = plan.memory()
    return {
        "run": plan.run.name,
        "device": plan.device.name,
        "nodes": plan.nodes,
        "devices_per_node": plan.devices_per_node,
        "devices": plan.world,
        "samples": plan.num_samples,
        "global_batch": plan.run.global_batch,
        "micro_batch": micro,
        "accumulation": accumulation,
        "zero_stage": plan.run.engine.zero_stage,
        "compile": plan.run.engine.compile,
        "cuda_graphs": plan.run.engine.cuda_graphs,
        "memory": None if held is None else {"moment": held.moment, "parts": dict(held.parts), "total": held.total,
                                             "used": plan.used(held), "room": plan.room, "fits": plan.fits(held)},
        "least_checkpointed_blocks": plan.least_checkpointed,
        "memory_by_stage": [_of_stage(plan, stage) for stage in STAGES],
        "multiply_adds_per_image": plan.multiply_adds,
        "collectives": [
            {"kind": c.kind, "purpose": c.purpose, "bytes": c.total_bytes, "calls": c.calls,
             "seconds": plan.wires.seconds(c)}
            for c in plan.collectives()
        ],
        "step_s": plan.whole_step_s,
        "step_parts_s": plan.step_parts_s,
        "images_per_s": plan.run.global_batch / plan.whole_step_s,
        "checkpoint": {
            "bytes": plan.checkpoint_bytes, "writers": plan.writers[0], "cost_s": plan.upkeep.cost_s,
            "bucket_s": plan.save_s(plan.value("bucket_gb_per_s")), "disk_s": plan.save_s(plan.value("disk_gb_per_s")),
            "mean_time_between_failures_s": plan.upkeep.mean_time_s if math.isfinite(plan.upkeep.mean_time_s) else None,
            "every_s": plan.save_every_s, "lost_share": plan.lost_share,
        },
        "total_steps": plan.total_steps,
        "epochs": plan.total_steps * plan.run.global_batch / (plan.num_samples * plan.run.data.repeats),
        "days": plan.wall_s / 86400,
        "device_hours": plan.device_hours,
        "kwh": plan.kwh,
        "money": None if plan.price is None else plan.price * plan.device_hours,
        "bottleneck": plan.bottleneck,
        "assumptions": {k: {"value": a.value, "unit": a.unit, "source": a.source} for k, a in plan.assumed.items()},
    }  # fmt: skip


def _of_stage(plan: Plan, stage: int) -> dict[str, Any]:
    found: dict[str, Any] = {"stage": stage}
    for name, is_on in (("plain", False), ("checkpointing", True)):
        held = plan.memory(stage=stage, checkpointing=is_on)
        if held is not None:
            largest = plan.largest_micro_batch(stage=stage, checkpointing=is_on)
            found[name] = {"total": held.total, "used": plan.used(held), "largest_micro_batch": largest}
    found["communication_bytes"] = sum(c.total_bytes for c in plan.collectives(stage))
    found["communication_s"] = plan.communication_s(stage)
    return found
