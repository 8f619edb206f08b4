"""NFNet-F0, all 12 blocks of it, as one graph."""

from typing import Any

import pytest
import torch

import nfnet
from pipeline.compilation import compile_engine, passes
from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.distributed import join
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.engine.engine import Engine
from pipeline.engine.optim_config import OptimConfig


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_f0_is_one_graph_of_eager_numbers(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(passes, "BACKEND", "aot_eager")  # inductor takes twenty minutes for it
    torch.manual_seed(0)
    network = nfnet.create_model("nfnet_f0", num_classes=1000)
    for name, parameter in network.named_parameters():
        if name.endswith("skip_gain"):  # at 0 no block would count
            torch.nn.init.constant_(parameter, 0.5)
    config = EngineConfig(compile="network", precision=precision)
    optim = OptimConfig(learning_rate=0.1, ema_decay=None)
    engine = Engine(network, optim=optim, config=config, world=join(), micro_batch=2, accumulation=1)
    engine.evaluation_batch = 2
    # What it returns says that loss, gradient and logits were compared, and that no graph broke.
    records = compile_engine.compiled(engine, config, AugmentConfig(image_px=64), 1000)
    words = ""
    while not words:
        try:
            next(records)
        except StopIteration as end:
            words = end.value
    engine.close()
    assert words.startswith("network, 2 graphs in ")  # of training and of evaluation
