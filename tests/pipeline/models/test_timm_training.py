"""timm's networks with running statistics through the whole product: trained, resumed, started from, exported."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import load
from pipeline.checkpoint.commit import committed, read_commit
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.datasets import DataConfig
from pipeline.duration import Duration
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.optim_config import OptimConfig
from pipeline.errors import UserError
from pipeline.export.export import export
from pipeline.models.backbone import ModelConfig, build_model, load_backbone
from pipeline.training.check_run import check_network
from pipeline.training.run import Run
from pipeline.training.train import train

timm = pytest.importorskip("timm")


def run_of(digits: str, name: str = "timm:resnet10t", px: int = 32) -> Run:
    return Run(
        name="bn",
        model=ModelConfig(name=name),
        data=DataConfig(url=digits),
        augment=AugmentConfig(image_px=px),
        optim=OptimConfig(learning_rate=0.05, ema_decay=0.9),
        engine=EngineConfig(parity_check=False),
        global_batch=4,
        duration=Duration(4, "steps"),
        eval_every=Duration(3, "steps"),
        save_every=Duration(1, "steps"),
    )


@pytest.fixture(scope="module")
def trained(digits: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("bn"))
    list(train(run_of(digits), out))
    return out


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(trained: str, digits: str, tmp_path: Path) -> None:
    list(train(run_of(digits), str(tmp_path), leave_at=2))
    list(train(run_of(digits), str(tmp_path)))
    cache = load.default_cache()
    whole, parts = (load.load_state(read_commit(committed(out)[0]), cache) for out in (trained, str(tmp_path)))
    assert set(whole) == {"weights", "momentum", "ema"}
    name = "trunk.bn1.running_var"
    assert not torch.equal(whole["ema"][name], whole["weights"][name]) and name not in whole["momentum"]
    assert whole["weights"]["trunk.bn1.num_batches_tracked"] == 4
    for kind, tensors in whole.items():
        for key, tensor in tensors.items():
            assert torch.equal(parts[kind][key], tensor), (kind, key)


@pytest.mark.slow
def test_another_run_starts_from_its_statistics_and_may_freeze_them(trained: str, digits: str, tmp_path: Path) -> None:
    config = ModelConfig(name="timm:resnet10t", init_from=trained, batch_norm="frozen")
    start, _ = build_model(config, 10, seed=5)
    list(train(replace(run_of(digits), model=config, duration=Duration(2, "steps"), eval_every=None), str(tmp_path)))
    after = load_backbone(str(tmp_path), "raw").model.state_dict()
    before = load_backbone(trained).model.state_dict()
    for name in ("trunk.bn1.running_mean", "trunk.bn1.running_var", "trunk.bn1.num_batches_tracked"):
        assert torch.equal(start.state_dict()[name], before[name]) and torch.equal(after[name], before[name])
    assert not torch.equal(after["trunk.bn1.weight"], before["trunk.bn1.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "timm", "onnx"])
def test_it_is_exported_in_every_form(trained: str, tmp_path: Path, format: str) -> None:
    out = str(tmp_path / "out")
    made = export(trained, format, out)
    assert made.difference <= made.tolerance and made.weights == "ema"
    images, model = torch.randn(2, 3, 32, 32), load_backbone(trained).model
    with torch.no_grad():
        if format == "safetensors":
            assert torch.equal(load_backbone(out).model(images), model(images))
        if format == "timm":
            theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
            torch.testing.assert_close(theirs(images), model(images), atol=1e-5, rtol=1e-5)


def test_frozen_statistics_need_a_network_that_has_some(digits: str) -> None:
    with pytest.raises(UserError, match=r"model\.batch_norm is frozen"):
        check_network(replace(run_of(digits), model=ModelConfig(name="nfnet_tiny", batch_norm="frozen")))
