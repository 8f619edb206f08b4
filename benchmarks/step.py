"""Forward + backward of NFNet-F0 on the CPU: ours against timm's dm_nfnet_f0 in either layout, and the bare convolutions.

python -m benchmarks step             fp32 and bf16, 128 and 192 px; compiled: `benchmarks.step_compiled`
"""

import contextlib
from collections.abc import Callable

import timm
import torch
from torch import nn
from torch.nn import functional as F

import nfnet
from benchmarks.turns import race
from nfnet.functional import multiplied, padded
from nfnet.layers import WSConv2d

BATCH, TARGET = 8, 1.25


def main() -> None:
    for px in (128, 192):
        for dtype in (torch.float32, torch.bfloat16):
            images = torch.randn(BATCH, 3, px, px)
            last = images.to(memory_format=torch.channels_last)
            ours = nfnet.create_model("nfnet_f0").to(memory_format=torch.channels_last).train()
            theirs = timm.create_model("dm_nfnet_f0").train()
            theirs_last = timm.create_model("dm_nfnet_f0").to(memory_format=torch.channels_last).train()
            runs = {
                "ours, channels-last": _step(ours, last, dtype),
                "timm, contiguous": _step(theirs, images, dtype),
                "timm, channels-last": _step(theirs_last, last, dtype),
            }
            runs["the convolutions alone"] = bare_convolutions(ours, last, dtype)
            title = f"forward + backward, F0 at {px} px, batch {BATCH}, {str(dtype).removeprefix('torch.')}"
            race(title, runs, ours="ours, channels-last", target=TARGET, limit="the convolutions alone", rounds=5)


def _step(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        with torch.autocast(images.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
            loss = model(images).logsumexp(1).sum()
        loss.backward()

    return step


def bare_convolutions(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of every convolution of the network on its own, on ready weights and random images.

    As the network's own, in fp32 where the processor would emulate bf16.
    """
    layers: list[tuple[torch.Tensor, torch.Tensor, int, tuple[int, int], int]] = []

    def record(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        assert isinstance(module, WSConv2d)
        x, padding = padded(inputs[0].detach(), module.kernel, module.stride, "same")
        x, weight = multiplied(torch.randn_like(x, dtype=dtype), torch.randn_like(module.weight, dtype=dtype))
        x.requires_grad_(len(layers) > 0)  # nobody needs the images' gradient
        layers.append((x, weight.requires_grad_(), module.stride, padding, module.groups))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, WSConv2d)]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    grads: list[torch.Tensor] = []

    def run() -> None:
        for i, (x, weight, stride, padding, groups) in enumerate(layers):
            y = F.conv2d(x, weight, None, stride, padding, groups=groups)
            if len(grads) == i:
                grads.append(torch.randn_like(y))
            torch.autograd.grad(y, [t for t in (x, weight) if t.requires_grad], grads[i])

    return run
