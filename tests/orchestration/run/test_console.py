"""The console's facts, without a terminal and with one."""

import contextlib
import io
from dataclasses import replace

import pytest

from orchestration.run.console import Console
from orchestration.run.lines import duration, size
from orchestration.run.time_left import TimeLeft
from pipeline.records import Evaluation, Finished, PassedOver, Phase, Saved, Skipped, Started, Step, Stopped


def started() -> Started:
    return Started(
        step=0,
        run_name="glyphs",
        run_dir="/runs/[glyphs]",
        total_steps=1000,
        total_samples=64_000,
        samples_per_epoch=12_345,
        steps_per_epoch=192.89,
        dropped_samples=2_275,
        global_batch=64,
        micro_batch=16,
        accumulation=2,
        num_ranks=2,
        num_parameters=1_234_567,
        device="cpu",
        zero_stage=1,
        precision="fp32",
        resumed_from=None,
        config={},
        config_digest="c0ffee00c0ffee00",
        dataset_digest="da7ada7ada7ada7a",
    )


def step(number: int) -> Step:
    return Step(
        step=number,
        num_updates=10,
        samples=number * 64,
        epoch=0.1,
        loss=2.34567,
        accuracy=0.456,
        learning_rate=0.1,
        clipped_share=0.12,
        gradient_norm=1.0,
        images_per_s=1234.0,
        data_wait_s=0.05,
        step_s=0.5,
        remaining_s=3723.0,
    )


EVENTS = [
    Phase(step=0, name="starting the engine"),
    PassedOver(step=0, url="/runs/g/c1", reason="a file is short"),
    started(),
    Phase(step=0, name="training"),
    step(10),
    Skipped(step=10, reason="loss is not finite", samples=704, keys=("a", "b")),
    Evaluation(step=20, split="val", weights="ema", loss=1.5, top1=0.625, top5=0.9, num_samples=2000, seconds_s=2.0),
    Saved(step=20, url="/runs/g/c2", digest="d", size_bytes=12_300_000, seconds_s=0.5),
    Finished(
        step=1000, checkpoint="/runs/g/c9", samples=64_000, seconds_s=125.0, evaluation={"loss": 1.25, "top1": 0.7}
    ),
]


def show(*records: object, live: bool = False, next_command: str = "", **options: object) -> str:
    stream = io.StringIO()
    with contextlib.closing(Console(stream, live=live, **options)) as console:  # type: ignore[arg-type]
        for record in records:
            console.read(record, next_command=next_command)  # type: ignore[arg-type]
    return stream.getvalue()


FACTS = [
    "12,345 images an epoch, 192.89 steps; 2,275 of the last epoch are dropped",
    "64 = 2 processes x 16 images x 2 accumulated",
    "1,234,567 parameters in fp32",
    "1,000 steps, 64,000 images",
    "/runs/[glyphs]",  # brackets are no markup
    "/runs/g/c1: a file is short",
    "loss is not finite",
    "top-1 62.50%, top-5 90.00%",
    "2,000 images of val (ema weights, 2.0 s)",
    "/runs/g/c2 (12.3 MB",
    "glyphs is done: 1,000 steps, 64,000 images, 2 min 05 s",
    "loss 1.2500, top1 70.00%",
    "1 updates that were not finite",
    "/runs/g/c9",
    "normfree transfer X",
]


@pytest.mark.parametrize("live", [False, True])
def test_every_fact_is_shown(live: bool) -> None:
    text = show(*EVENTS, live=live, next_command="normfree transfer X")
    assert [fact for fact in FACTS if fact not in text] == []


def test_without_a_terminal_a_line_of_plain_text_holds_the_step() -> None:
    lines = show(*EVENTS).splitlines()
    assert "step 10/1000  left 1 h 02 min  loss 2.3457  acc 45.6%  1,234 img/s  clipped 12%  data wait 10%" in lines
    assert "\x1b" not in "".join(lines) and "starting the engine" in lines


def test_the_share_of_the_devices_rate_stands_beside_the_images() -> None:
    plan = show(replace(started(), image_flops=3e9, device_flops=45.2e9))
    assert "ZeRO stage 1; 45.2 GFLOP/s in products of matrices (fp32, each process)" in plan
    assert "  1,234 img/s (41% of the matrix rate)  clipped" in show(replace(step(10), flops_share=0.409))
    # A rate that was measured while others had the machine is no measure.
    assert "  1,234 img/s (above the matrix rate at the start)  clipped" in show(replace(step(10), flops_share=3.99))


def test_a_step_line_names_the_part_that_is_clipped_most_and_the_one_that_moves_most() -> None:
    parts: dict[str, dict[str, float | None]] = {
        "stem": {"clipped_share": 0.5, "update_ratio": 0.001},
        "stage 0": {"clipped_share": 0.1, "update_ratio": 0.0123},
        "head": {"clipped_share": 0.0, "update_ratio": float("nan")},
    }
    assert "  clipped 12% (stem 50%)  moved at most 1.23% (stage 0)  data" in show(replace(step(10), parts=parts))
    parts["head"] = {"clipped_share": 1.0, "update_ratio": None}
    assert "  clipped 12% (the head's bias 100%)  moved" in show(replace(step(10), parts=parts))
    # An update that was not measured, and a network all of whose parts are clipped alike, say no more than the whole.
    parts = {name: {"clipped_share": 0.12, "update_ratio": None} for name in parts}
    assert "  clipped 12%  data wait" in show(replace(step(10), parts=parts))


def test_what_is_left_follows_the_recent_pace_and_not_the_start() -> None:
    left, times = TimeLeft(), [0.0, 1500.0, 1510.0, 1520.0, 1530.0, 1540.0]
    assert [left.left_s(10 * n, 100, now_s) for n, now_s in enumerate(times, 1)] == [None, None, None, 60.0, 50.0, 40.0]


def test_plain_step_lines_are_rare_and_the_last_one_shows() -> None:
    now_s = iter(range(10_000))
    text = show(started(), *(step(n) for n in range(1, 1001)), interval_s=100.0, clock=lambda: float(next(now_s)))
    shown = [line for line in text.splitlines() if line.startswith("step ")]
    assert 5 <= len(shown) <= 11 and shown[-1].startswith("step 1000/1000")


def test_a_stopped_run_says_how_it_goes_on() -> None:
    stream = io.StringIO()
    Console(stream).read(Stopped(step=7, checkpoint="/c7", reason="SIGTERM"), next_command="normfree pretrain glyphs")
    assert "stopped at step 7: SIGTERM" in stream.getvalue()
    assert "/c7" in stream.getvalue() and "go on  normfree pretrain glyphs" in stream.getvalue()


@pytest.mark.parametrize(
    "seconds_s, text",
    [
        (3.21, "3.2 s"),
        (59.4, "59 s"),
        (245.0, "4 min 05 s"),
        (7620.0, "2 h 07 min"),
        (273_600.0, "3 d 04 h"),
        (float("nan"), "?"),
    ],
)
def test_durations_read_well(seconds_s: float, text: str) -> None:
    assert duration(seconds_s) == text


def test_sizes_read_well() -> None:
    assert [size(n) for n in (12, 4_500, 12_300_000, 2.5e12)] == ["12 B", "4.5 kB", "12.3 MB", "2.5 TB"]
