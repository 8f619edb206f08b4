"""Correlated batches: the same samples as the windowed order, batch by batch, sorted by class."""

import numpy as np
import pytest

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig, TrainData
from pipeline.data.sampling.subset import Subset

BATCH = 32


@pytest.mark.parametrize("changes", [{}, {"repeats": 2}, {"subset": Subset(per_class=8)}])
def test_a_batch_has_the_windowed_orders_samples_sorted_by_class(digits: str, changes: dict[str, object]) -> None:
    plain, by_class = (
        TrainData(DataConfig(url=digits, order=order, **changes), AugmentConfig(image_px=8), seed=3)  # type: ignore[arg-type]
        for order in ("windowed", "correlated")
    )
    distinct = plain.distinct(BATCH)
    for step in (0, 3, 47):  # the last lies in a later epoch
        _, samples, views = plain.draw(step, BATCH)
        _, found, their_views = by_class.draw(step, BATCH)
        assert sorted(zip(found, their_views, strict=True)) == sorted(zip(samples, views, strict=True))
        labels = plain.index.label[found[:distinct]]
        assert (np.diff(labels) >= 0).all() and not (np.diff(plain.index.label[samples[:distinct]]) >= 0).all()
        groups = labels.reshape(-1, 4)
        assert (
            np.mean([len(set(g)) for g in groups])
            < 2.5
            < np.mean([len(set(g)) for g in plain.index.label[samples[:distinct]].reshape(-1, 4)])
        )
