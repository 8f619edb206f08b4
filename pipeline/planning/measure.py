"""Real steps of the real engine on the device at hand, in place of what a plan would assume of it."""

import dataclasses
import os
import statistics
import time

import torch

from pipeline.compilation.compile_engine import compiled
from pipeline.distributed import World, device_name, join, leave
from pipeline.engine.engine import Engine
from pipeline.errors import UserError
from pipeline.models.backbone import build_model
from pipeline.planning.devices import Device
from pipeline.planning.plan import Plan

SECONDS = 5.0
MOST_STEPS = 50


def host_memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def check_device(device: Device) -> None:
    """Raises UserError where the device at hand is of another kind than the one that is planned for."""
    has_gpu = torch.cuda.is_available()
    if has_gpu == device.is_cpu:
        here = torch.cuda.get_device_name() if has_gpu else "a CPU"
        raise UserError(
            f"--measure runs on the device at hand, {here}, and the plan is for --device {device.name}; leave out one of the two"
        )


def measured(plan: Plan, *, num_classes: int) -> Plan:
    """The plan with the time of its step as this device takes it: one process, the run's micro-batch, noise for images."""
    micro, accumulation = plan.batches
    world = join()
    try:
        engine = Engine(
            build_model(dataclasses.replace(plan.run.model, init_from=None), num_classes, seed=0)[0],
            optim=plan.run.optim,
            config=dataclasses.replace(
                plan.run.engine, zero_stage=0 if world.size == 1 else plan.run.engine.zero_stage
            ),
            world=world,
            micro_batch=micro,
            accumulation=1,
        )
        for _ in compiled(engine, plan.run.engine, plan.run.augment, num_classes):
            pass
        pass_s, update_s, steps = _time(engine, micro, plan.run.augment.image_px, num_classes, world)
        engine.close()
        name = device_name(world.device)
    finally:
        leave()
    share = 2 * plan.multiply_adds * micro / pass_s / plan.device.flops(plan.run.engine)
    assumption = dataclasses.replace(
        plan.assumed["compute_share"],
        value=share,
        source=f"measured: {steps} steps of {micro} images on {name}, {pass_s:.3g} s each, update {update_s:.3g} s",
    )
    return dataclasses.replace(
        plan, assumed={**plan.assumed, "compute_share": assumption}, step_s=accumulation * pass_s + update_s
    )


def _time(engine: Engine, micro: int, px: int, num_classes: int, world: World) -> tuple[float, float, int]:
    """Median seconds of a forward and backward pass and of an update, and the number of steps, the first one left out."""
    images = torch.randn(micro, 3, px, px).to(world.device, memory_format=torch.channels_last)
    labels = torch.randint(num_classes, (micro,), device=world.device)
    rows: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(rows) < 2 or (time.perf_counter() - begin < SECONDS and len(rows) < MOST_STEPS):
        marks = [_now(world)]
        engine.forward_backward(images, labels, is_last=True)
        marks.append(_now(world))
        engine.update(1e-3)
        marks.append(_now(world))
        rows.append((marks[1] - marks[0], marks[2] - marks[1]))
    pass_s, update_s = map(statistics.median_high, zip(*rows[1:], strict=True))
    return pass_s, update_s, len(rows) - 1


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
