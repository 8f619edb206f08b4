"""A plan as lines for people."""

import math
from collections.abc import Iterator

from pipeline.planning.plan import Plan
from pipeline.planning.plan_record import STAGES


def lines(found: list[Plan]) -> list[str]:
    """The whole of one plan; of several a table, and the whole of the first."""
    out = [*_whole(found[0])]
    if len(found) > 1:
        out += ["", *_table(found)]
    return [*out, "", "what this rests on (set any with --assume NAME=VALUE):", *_assumptions(found[0])]


def _whole(plan: Plan) -> Iterator[str]:
    micro, accumulation = plan.batches
    yield (
        f"{plan.run.name} on {plan.nodes} x {plan.devices_per_node} {plan.device.name}: {plan.num_samples:,} images, "
        f"batch {plan.run.global_batch:,} = {plan.world} devices x {micro} x {accumulation}"
    )
    yield from _other_micro_batch(plan)
    yield f"  passes: {_passes(plan)}"
    yield f"  bottleneck: {plan.bottleneck}"
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _step(plan)
    yield ""
    yield from _upkeep(plan)
    yield ""
    yield from _cost(plan)


def _passes(plan: Plan) -> str:
    """As the run asks for them."""
    engine = plan.run.engine
    how = {
        "none": "eager",
        "blocks": "each kind of block compiled",
        "network": "network and loss compiled as one graph",
    }
    return f"{how[engine.compile]}{', recorded as CUDA graphs' if engine.cuda_graphs else ''}, {engine.precision}"


def _memory(plan: Plan) -> Iterator[str]:
    held = plan.memory()
    assert held is not None
    verdict = "fits" if plan.fits(held) else "does not fit"
    yield (
        f"memory of a device: {size(plan.used(held))} of {size(plan.room)}, {verdict}; most of it in the {held.moment}, "
        f"ZeRO stage {plan.run.engine.zero_stage}"
    )
    yield "  " + ", ".join(f"{name} {size(n)}" for name, n in held.parts.items())
    if (num := plan.least_checkpointed) is not None:
        share = math.floor(1000 * num / plan.network.num_blocks) / 1000  # of which the blocks are the next whole number
        every = " --engine.checkpointed_every 1" if plan.run.engine.checkpointed_every > 1 else ""
        yield (
            f"  it fits where {num} of {plan.network.num_blocks} blocks are computed again: "
            f"--engine.activation_checkpointing true --engine.checkpointed_share {share:g}{every}"
        )
    yield f"  and {plan.value('context_gb') + plan.value('workspace_gb'):.2g} GB for the process, its context and workspaces"
    yield "  stage      memory  largest micro-batch   checkpointing  largest micro-batch   sent a step"
    for stage in STAGES:
        row = f"  {stage}    "
        for is_on in (False, True):
            of = plan.memory(stage=stage, checkpointing=is_on)
            if of is None:
                row += f"  {'-':>12}  {'-':>19}"
                continue
            largest = plan.largest_micro_batch(stage=stage, checkpointing=is_on)
            row += f"  {size(plan.used(of)):>{9 if not is_on else 14}}  {largest or 'none':>19}"
        sent = sum(c.total_bytes for c in plan.collectives(stage))
        yield f"{row}  {size(sent):>12}"


def _step(plan: Plan) -> Iterator[str]:
    yield (
        f"a step: {duration(plan.whole_step_s)}, {plan.run.global_batch / plan.whole_step_s:,.0f} images/s; "
        f"{plan.multiply_adds / 1e9:,.1f} G multiply-adds an image, forward and backward"
    )
    for part, seconds in plan.step_parts_s.items():
        yield f"  {part:<24} {duration(seconds):>10}  {seconds / plan.whole_step_s:4.0%}"
    for c in plan.collectives():
        sent = f"{size(c.total_bytes):>9} in {c.calls:>4} calls"
        yield f"    {c.kind:<14} {sent}  {duration(plan.wires.seconds(c)):>9}  {c.purpose}"
    images = plan.run.global_batch / plan.whole_step_s / plan.nodes
    rate = images * plan.value("bytes_per_image")
    cores = plan.data_s["decoding"] / plan.whole_step_s * plan.value("cores_per_device")
    yield (
        f"  data of a node: {images:,.0f} images/s, {rate / 1e6:,.0f} MB/s from bucket or disk "
        f"({rate / 1e9 / plan.value('bucket_gb_per_s'):.0%} of the bucket's rate, {rate / 1e9 / plan.value('disk_gb_per_s'):.0%} "
        f"of a disk's), {cores:.1f} cores a device to decode"
    )


def _upkeep(plan: Plan) -> Iterator[str]:
    up, bucket_s = plan.upkeep, plan.save_s(plan.value("bucket_gb_per_s"))
    yield (
        f"a checkpoint: {size(plan.checkpoint_bytes)} from {plan.writers[0]:,} ranks; training waits {duration(up.cost_s)}, "
        f"then {duration(bucket_s)} to the bucket or {duration(plan.save_s(plan.value('disk_gb_per_s')))} to a disk"
    )
    if math.isinf(up.mean_time_s):
        yield "  no failures are expected: save as often as you like to look back"
        return
    every = plan.save_every_s
    yield (
        f"  a failure every {duration(up.mean_time_s)}: save every {duration(every)} "
        f"(--save_every '{max(round(every / plan.whole_step_s), 1)} steps', Daly 2006), "
        f"which costs {plan.lost_share:.2%} with restarts"
    )
    longest = up.longest_s(plan.loss)
    if longest is None:
        yield f"  no interval keeps the loss below {plan.loss:.3g}: failures and restarts alone cost more"
    elif longest < bucket_s:
        yield f"  for a loss of {plan.loss:.2%} save every {duration(longest)}, sooner than the bucket takes one"
    else:
        yield f"  for a loss of {plan.loss:.2%} every {duration(longest)} is enough"


def _cost(plan: Plan) -> Iterator[str]:
    epochs = plan.total_steps * plan.run.global_batch / (plan.num_samples * plan.run.data.repeats)
    money = "" if plan.price is None else f", {plan.price * plan.device_hours:,.0f} at {plan.price:g} a device-hour"
    yield (
        f"the run: {plan.total_steps:,} steps, {epochs:.3g} epochs, {duration(plan.wall_s)} with failures, "
        f"{plan.device_hours:,.0f} device-hours, {plan.kwh:,.0f} kWh{money}"
    )


def _table(found: list[Plan]) -> Iterator[str]:
    yield "  nodes  devices  micro-batch    memory      step  communication  images/s     days  device-hours  save every"
    for plan in found:
        held = plan.memory()
        assert held is not None
        share = plan.communication_s() / plan.whole_step_s
        yield (
            f"  {plan.nodes:>5}  {plan.world:>7}  {plan.batches[0]:>11}  {size(plan.used(held)):>8}  "
            f"{duration(plan.whole_step_s):>8}  {share:>13.0%}  {plan.run.global_batch / plan.whole_step_s:>8,.0f}  "
            f"{plan.wall_s / 86400:>7.3g}  {plan.device_hours:>12,.0f}  {duration(plan.save_every_s):>10}"
        )
    for plan in found[1:]:
        yield from _other_micro_batch(plan)


def _other_micro_batch(plan: Plan) -> Iterator[str]:
    micro, share = plan.batches[0], plan.run.global_batch // plan.world
    if plan.run.micro_batch not in (0, "auto", micro):
        yield (
            f"  {plan.nodes} nodes: planned with --micro_batch {micro}, which such a run needs: the run's "
            f"{plan.run.micro_batch} does not divide a device's {share} image{'s' if share > 1 else ''}"
        )


def _assumptions(plan: Plan) -> Iterator[str]:
    for name, a in plan.assumed.items():
        yield f"  {name:<24} {a.value:>10,.6g} {a.unit}  [{a.source}]"


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} GB"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    for limit, unit, factor in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"
