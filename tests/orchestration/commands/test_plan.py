"""`normfree plan`: what it prints, and one sentence for each mistake."""

import json
from typing import Any

import pytest

from tests.orchestration.commands.test_cli import run
from tests.waiting import sentences

TINY = "plan nfnet_tiny_glyphs --samples 58500 --classes 325 --gpus-per-node 2"


def planned(words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    code, out, err = run(f"{words} --json", capsys)
    assert code == 0, err
    return json.loads(out)


MISTAKES = {
    "plan nfnet_tiny_glyphs --samples 10 --device h1000": "choose one of v100, a100",
    "plan nfnet_tiny_glyphs --samples 10 --nodes 3 --gpus-per-node 7": "global_batch 128 does not divide over 21",
    "plan nfnet_tiny_glyphs --samples 0": "--samples: '0'",
    "plan nfnet_tiny_glyphs --samples 10 --network 400": "--network is '400'; write a number and its unit, as 400Gb",
    "plan nfnet_tiny_glyphs --samples 10 --nodes 0": "--nodes is '0'",
    "plan nfnet_tiny_glyphs --samples 10 --nodes 1,1": "--nodes is '1,1'",
    "plan nfnet_tiny_glyphs --samples 10 --gpus-per-node 0": "--gpus-per-node: '0'",
    "plan nfnet_tiny_glyphs --samples 10 --loss 200%": "--loss is '200%'",
    "plan nfnet_tiny_glyphs --samples 10 --assume speed=2": "--assume has no 'speed'",
    "plan nfnet_tiny_glyphs --samples 10 --assume compute_share=2": "at most 1",
    "plan nfnet_tiny_glyphs --samples 10 --power -1": "--power: '-1'",
    "plan nfnet_tiny_glyphs --samples 10 --data x": "leave out one",
    "plan nfnet_tiny_glyphs --data nowhere": "there is no dataset at nowhere",
    "plan nfnet_tiny_glyphs --samples 10 --measure --device h100": "--measure runs on the device at hand",
    "plan nfnet_tiny_glyphs --samples 10 --lr 3": "--optim.learning_rate",
    "plan": "no recipe",
    "plan nothing": "nothing",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_gets_one_sentence(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(words, capsys)
    said = sentences(err)
    assert code == 2 and not out and len(said) == 1 and MISTAKES[words] in said[0]


def test_text_names_bottleneck_moments_and_every_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(f"{TINY} --nodes 1,2 --price-per-device-hour 2 --loss 2%", capsys)
    assert code == 0, err
    for text in (
        "bottleneck: ",
        "memory of a device",
        "a checkpoint: ",
        "device-hours",
        " at 2 a device-hour",
        "for a loss of 2.00%",
    ):
        assert text in out
    assert "  compute_share  " in out and "[device table, https://" in out
    assert len([line for line in out.splitlines() if line.startswith(("      1        2", "      2        4"))]) == 2


def test_a_micro_batch_that_many_devices_leave_no_room_for_is_planned_smaller_and_that_is_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = f"{TINY} --nodes 1,4,16 --micro_batch 48"
    plans = json.loads(run(f"{words} --json", capsys)[1])
    assert [p["micro_batch"] for p in plans] == [16, 16, 4]
    assert "16 nodes: planned with --micro_batch 4, which such a run needs" in run(words, capsys)[1]


def test_fields_flags_and_data_change_what_they_should(digits: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = planned(TINY, capsys)
    other = planned(f"{TINY} --global_batch 256 --engine.zero_stage 2 --power 100 --failure-rate 0.5", capsys)
    assert other["global_batch"] == 256 and other["zero_stage"] == 2
    assert other["assumptions"]["watts"] == {**plain["assumptions"]["watts"], "value": 100.0, "source": "given"}
    assert other["checkpoint"]["mean_time_between_failures_s"] == pytest.approx(86400)
    of_data = planned(f"plan nfnet_tiny_glyphs --data {digits} --gpus-per-node 1 --device cpu", capsys)
    assert "shards / images" in of_data["assumptions"]["bytes_per_image"]["source"]
    assert 0 < of_data["samples"] < 1797 and of_data["memory"]["room"] > 1e9
