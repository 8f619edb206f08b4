"""What a run says of the parts of its network."""

from pathlib import Path

import pytest

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.engine.update_stats import PartStats, over_updates
from pipeline.models.backbone import ModelConfig
from pipeline.records import Step
from pipeline.training.run import Run
from pipeline.training.train import train


def stats(clipped: float, norm: float, ratio: float | None) -> PartStats:
    return PartStats(clipped_share=clipped, gradient_norm=norm, weight_norm=2.0, update_ratio=ratio)


def test_a_report_has_the_mean_clipped_share_and_the_last_updates_norms() -> None:
    found = over_updates([{"stem": stats(0.5, 9.0, None)}, {"stem": stats(1.0, 3.0, 0.25)}])
    assert found == {"stem": {"clipped_share": 0.75, "gradient_norm": 3.0, "weight_norm": 2.0, "update_ratio": 0.25}}


def test_each_report_measures_its_last_update_part_by_part(digits: str, tmp_path: Path) -> None:
    run = Run(
        name="parts",
        model=ModelConfig(name="nfnet_tiny"),
        data=DataConfig(url=digits, num_workers=0),
        augment=AugmentConfig(image_px=16, area_min=0.5, flip=False),
        optim=OptimConfig(learning_rate=0.1),
        engine=EngineConfig(parity_check=False),
        global_batch=8,
        micro_batch=8,
        duration=Duration(5, "steps"),
        log_every_steps=2,
        save_final=False,
    )
    steps = [r for r in train(run, str(tmp_path / "run")) if isinstance(r, Step)]
    assert [s.step for s in steps] == [2, 4, 5]
    for step in steps:
        assert list(step.parts) == ["stem", *(f"stage {i}" for i in range(3)), "final", "head"]
        assert all(ratio is not None and 0 < ratio < 1 for p in step.parts.values() for ratio in [p["update_ratio"]])
        # The parts' norms are the legs of the whole's.
        squares = sum(p["gradient_norm"] ** 2 for p in step.parts.values())  # type: ignore[operator]
        assert squares**0.5 == pytest.approx(step.gradient_norm, rel=1e-5)
