"""What the functions launch compiles to machine code of the cards in use; that takes no GPU.

A driver that only names its card stands in for CUDA's: Triton binds, specialises and compiles as it would before a launch.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after the skip
from triton.runtime.driver import driver  # noqa: E402

from nfnet.kernels import (  # noqa: E402
    reference,
    triton_layers,
    triton_update_kernels,
)

if not isinstance(triton_update_kernels.update, triton.JITFunction):
    pytest.skip("Triton's interpreter is switched on: nothing can be compiled", allow_module_level=True)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Any]]:
    """(name, compiled kernel) of each launch, which is compiled and not run."""
    card = SimpleNamespace(
        get_current_device=lambda: 1000 + request.param,  # no real card's number: Triton keeps kernels by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", request.param, 32),
    )
    launches: list[tuple[str, Any]] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        assert len(grid) == 1 and grid[0] > 0
        launches.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    monkeypatch.setattr(driver, "_active", card)
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # not what was compiled some other day
    return launches


def check(built: list[tuple[str, Any]], names: list[str], *, wide: bool = True) -> None:
    """`wide`: 16 bytes a thread are read at once."""
    assert [name for name, _ in built] == names
    for name, kernel in built:
        assert kernel.asm["cubin"], name
        if name != "factors":
            assert ("ld.global.v4" in kernel.asm["ptx"]) == wide, name
    built.clear()


@pytest.mark.parametrize(
    "shape, wide", [((8, 3, 3, 3), False), ((8, 128, 3, 3), True), ((8, 512, 1, 1), True)], ids=str
)
def test_standardisation_compiles(built: list[tuple[str, Any]], shape: tuple[int, ...], wide: bool) -> None:
    weight, gain = torch.zeros(shape), torch.ones(shape[0], 1, 1, 1)
    for dtype, eps in ((torch.float32, None), (torch.bfloat16, 1e-5), (torch.float16, None)):
        found = triton_layers.standardise(weight, gain, 1e-4, eps, out_dtype=dtype, memory_format=torch.channels_last)
        triton_layers.standardise_backward(found.out, weight, gain, *found[1:])
        check(built, ["standardise", "standardise_backward"], wide=wide)


@pytest.mark.parametrize("name", reference.ACTIVATIONS)
def test_activations_compile(built: list[tuple[str, Any]], name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):  # fp16 differs from bf16 in two conversions
        x = torch.zeros(2, 64, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
        triton_layers.scaled_activation(x, name, 1.7)
        triton_layers.scaled_activation_backward(x, x, name, 1.7, 0.9)
        check(built, ["forward", "backward"])


SHAPES = [(8, 128, 3, 3), (16,), (32, 64, 1, 1), (4, 1536)]
"""Of short and of long units: two launches."""
RATES = reference.Rates(lr=0.1, momentum=0.9, weight_decay=1e-5, keep=0.999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_and_update_compiles(built: list[tuple[str, Any]], dtype: torch.dtype) -> None:
    params, momenta, averages = ([torch.zeros(s) for s in SHAPES] for _ in range(3))
    grads = [p.to(dtype) for p in params]
    triton_layers.square_sums(grads)
    triton_layers.update_(params, grads, momenta, averages, RATES, factors=torch.ones(8 + 1 + 32 + 4))
    # Tables hide addresses from the compiler: without the hints in them every thread would load four bytes.
    check(built, ["square_sums"] * 2 + ["update"] * 2)
    triton_layers.update_(params, grads, momenta, [], RATES)
    check(built, ["update"] * 2)


def test_unaligned_tensors_are_read_element_by_element(built: list[tuple[str, Any]]) -> None:
    triton_layers.square_sums([torch.zeros(1 + 4 * 1536)[1:].view(4, 1536)])
    check(built, ["square_sums"], wide=False)
