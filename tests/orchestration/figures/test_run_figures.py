"""Figures of a run from its records, whatever its parts are called."""

from pathlib import Path

import pytest
from PIL import Image

from orchestration.figures.run_figures import training


@pytest.mark.parametrize("part", ["stage1", "$x_^$", "_hidden", "a" * 10_000, "\x1b[2J\u202e"])
def test_training_is_drawn_whatever_a_part_is_called(part: str, tmp_path: Path) -> None:
    numbers = {"loss": 1.0, "clipped_share": 0.5, "gradient_norm": 2.0, "images_per_s": 10.0}
    steps = [{"step": step, **numbers, "parts": {part: {"clipped_share": 0.5}, "stem": {}}} for step in range(3)]
    assert training(steps, tmp_path / "pictures" / "training.png")
    assert Image.open(tmp_path / "pictures" / "training.png").size == (1375, 704)
