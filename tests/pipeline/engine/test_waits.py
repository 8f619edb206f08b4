"""What a step makes the host wait for: one read of numbers from the device, at every stage."""

from collections import Counter
from typing import Any

import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.augment.transforms import normalise
from pipeline.distributed import join, leave
from tests.pipeline.programs import engine_steps as program

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
"""Of a tensor: each waits for the device that computes it."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_host_waits_once_a_step(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    me = join()
    options = {"stage": stage, "accumulation": 2}
    engine = program.make(me, options)
    program.train(me, engine, options, range(3))
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    from deepspeed.accelerator import get_accelerator

    for name in READS:
        counted(torch.Tensor, name)
    counted(get_accelerator(), "synchronize")
    images, labels = program.batch(3)
    for part in range(2):
        engine.forward_backward(images[4 * part :][:4], labels[4 * part :][:4], is_last=part == 1)
    engine.update(0.1)
    monkeypatch.undo()
    engine.close()
    leave()
    # In stage 3 the library looks at a norm, which is a number of the host's here (`pipeline.engine.zero_layout.Cut`).
    assert seen == ({"tolist": 1, "__bool__": 1} if stage == 3 else {"tolist": 1})


def test_what_images_are_scaled_with_is_made_once() -> None:
    images, config = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), AugmentConfig()
    with torch.inference_mode():
        normalise(images, config, torch.device("cpu"))
    made: list[int] = []
    tensor = torch.tensor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", lambda *a, **k: made.append(1) or tensor(*a, **k))
        found = normalise(images, config, torch.device("cpu"))
    assert not made and not found.is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_device_is_waited_for_once_a_step(stage: int) -> None:
    me = join()
    options = {"stage": stage, "accumulation": 1}
    engine = program.make(me, options)
    images, labels = (t.to(me.device) for t in program.batch(0))
    for _ in range(3):
        engine.forward_backward(images, labels, is_last=True)
        engine.update(0.1)
    torch.cuda.set_sync_debug_mode("warn")
    with pytest.warns(UserWarning, match="synchroniz") as waits:
        engine.forward_backward(images, labels, is_last=True)
        engine.update(0.1)
    torch.cuda.set_sync_debug_mode("default")
    engine.close()
    leave()
    assert len(waits) == 1, [str(w.message) for w in waits]
