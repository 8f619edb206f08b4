"""Frozen features on another dataset: against the probe typed out, and never its test split."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.errors import UserError
from transfer.lab.build import sweep_of_experiment
from transfer.lab.experiment import Experiment
from transfer.measurement import downstream as measured
from transfer.measurement.downstream import HELD, SHOTS, downstream


class Pixels(torch.nn.Module):
    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool) -> torch.Tensor:
        return x[:, 0].flatten(1)


def test_the_score_is_ridges_on_held_out_training_images(digits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    real, real_fit = measured.extract, measured.fit

    def extract(model: Any, task: Any, augment: Any, split: str) -> Any:
        splits.append(split)
        return real(model, task, augment, split)

    def fit(method: Any, points: Any, features: np.ndarray, labels: np.ndarray, *rest: Any, **named: Any) -> Any:
        scorer = real_fit(method, points, features, labels, *rest, **named)
        parts.append((features, labels))
        return lambda x: (parts.append((x, np.empty(0))), scorer(x))[1]

    monkeypatch.setattr(measured, "extract", extract)
    monkeypatch.setattr(measured, "fit", fit)
    root = str(Path(digits).parent)
    score = downstream(Pixels(), "digits", AugmentConfig(image_px=8, crop="none"), root, seed=1)
    assert splits == ["train"]
    (fitted, labels), (held, _) = parts
    assert np.bincount(labels).tolist() == [SHOTS] * 10 and len(held) == 10 * HELD
    assert not {row.tobytes() for row in fitted} & {row.tobytes() for row in held}
    assert 0.75 < score < 1  # scikit-learn's digits, ten images each: nearest mean reaches about 0.85


def test_datasets_are_looked_for_before_anything_trains(digits: str, tmp_path: Path) -> None:
    asked = Experiment(name="e", methods=("none",), downstream=("digits",))
    plain = Experiment(name="e", methods=("none",))
    made = [sweep_of_experiment(e, data=digits, out=str(tmp_path))[0].source for e in (asked, plain)]
    assert made[0].downstream == ("digits",) and made[0].backbone_digest != made[1].backbone_digest
    with pytest.raises(UserError, match=r"no dataset at .*flowers"):
        sweep_of_experiment(
            Experiment(name="e", methods=("none",), downstream=("flowers",)), data=digits, out=str(tmp_path)
        )
