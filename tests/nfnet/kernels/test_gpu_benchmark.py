"""What of the GPU's benchmark can be held without one."""

import math

import pytest
import torch
from torch import nn

import nfnet
from benchmarks import gpu
from nfnet.count import multiply_adds


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    assert capsys.readouterr().out == "gpu: there is no GPU here, so nothing is measured\n"


def test_the_bare_convolutions_are_the_networks_own() -> None:
    """Their multiply-adds and the linear layers' are what the network counts."""
    total = 0
    for conv, times in gpu.recorded("nfnet_f0", 2, 192).items():
        outs = [
            (size + 2 * pad - kernel) // conv.stride + 1
            for size, pad, kernel in zip(conv[2:4], conv.padding, conv.weight[2:], strict=True)
        ]
        total += times * math.prod(outs) * math.prod(conv.weight)
    with torch.device("meta"):
        model = nfnet.create_model("nfnet_f0")
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    assert total + linear == multiply_adds(model, 192)
