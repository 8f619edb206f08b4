"""A network of every family of timm's takes three steps, resumes bit for bit and goes back to timm; or it is known why not."""

import json
from pathlib import Path

import pytest

from tests.pipeline import processes
from tests.pipeline.programs.timm_families import FAMILIES

timm = pytest.importorskip("timm")
NOT_RUN = {
    "deepseek_vit": "412M parameters at least",
    "gemma4_vit": "167M parameters at least, and buffers that are infinite",
}
OTHER_HEADS = "take --format safetensors"
"""Trained and resumed; timm's classifier is more than a linear map."""
TIED = {"coat_tiny"}


@pytest.mark.slow
def test_every_family_trains_resumes_and_goes_back_to_timm(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    processes.run("timm_families.py", out, timeout_s=7200)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == FAMILIES
    problems = {row["name"]: row["problem"] for row in rows if row["problem"] and OTHER_HEADS not in row["problem"]}
    assert set(problems) == TIED and all("the same tensor" in text for text in problems.values()), problems


def test_the_list_has_every_family() -> None:
    from timm.models._registry import _model_to_module

    listed = {_model_to_module[name] for name in FAMILIES}
    assert listed | set(NOT_RUN) == set(_model_to_module.values())
