"""Every program in every form that is launched compiles to machine code of the cards in use; that takes no GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from triton.backends.compiler import GPUTarget  # noqa: E402 - after the skip
from triton.compiler import ASTSource  # noqa: E402

from nfnet.kernels import LAUNCH, activation_programs, plain, tables, update_programs, weight_programs  # noqa: E402

if not isinstance(update_programs.update, triton.JITFunction):
    pytest.skip("Triton's interpreter is switched on: nothing can be compiled", allow_module_level=True)

ALIGNED = [["tt.divisibility", 16]]
"""What the launcher finds of an address or a number that 16 divides."""


def build(program: Any, types: dict[str, str], capability: int = 90, num_warps: int = 4, **constants: Any) -> Any:
    """`types` of the arguments; those left out are int32; pointers are aligned as torch allocates."""
    signature = {name: types.get(name, "i32") for name in program.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    indices = {name: (i,) for i, name in enumerate(program.arg_names)}
    attributes = {
        indices[n]: ALIGNED for n, t in signature.items() if t.startswith("*") or n in ("fan_in", "numel", "num_units")
    }
    source = ASTSource(program, signature, {indices[n]: v for n, v in constants.items()}, attributes)
    return triton.compile(source, GPUTarget("cuda", capability, 32), LAUNCH | {"num_warps": num_warps})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that what is compiled here was not compiled by another version before."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    yield


UNITS = {"gain": "*fp32", "means": "*fp32", "rstds": "*fp32", "floored": "*u8", "floor": "fp32", "added_eps": "fp32"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype, turn, block", [("*fp32", False, 2048), ("*bf16", True, 2048), ("*fp16", True, 32)])
def test_standardisation_compiles(dtype: str, turn: bool, block: int, capability: int) -> None:
    types = UNITS | {"weight": "*fp32", "out": dtype, "grad_out": dtype, "grad_weight": "*fp32", "grad_gain": "*fp32"}
    warps = max(1, min(4, block // 256))
    forward = build(weight_programs.standardise, types, capability, warps, ADD_EPS=turn, TURN=turn, BLOCK=block)
    assert forward.asm["cubin"]
    assert turn or "ld.global.v4" in forward.asm["ptx"]
    assert build(weight_programs.standardise_backward, types, capability, warps, TURN=turn, BLOCK=block).asm["cubin"]


@pytest.mark.parametrize("name", plain.ACTIVATIONS)
def test_activations_compile_and_read_16_bytes_a_thread(name: str) -> None:
    types = {"x": "*bf16", "grad": "*bf16", "out": "*bf16", "before": "fp32", "factor": "fp32"}
    for program in (activation_programs.forward, activation_programs.backward):
        for capability in (80, 90):
            built = build(program, types, capability, NAME=name, BLOCK=1024)
            assert built.asm["cubin"] and "ld.global.v4" in built.asm["ptx"] and "st.global.v4" in built.asm["ptx"]


TABLES = {"pointers": "*i64", "sizes": "*i32", "items": "*i32", "gate": "*u8"}
SQUARES = dict.fromkeys(("weight_squares", "gradient_squares", "out", "factor_of"), "*fp32")
COUNTS = dict.fromkeys(("num_nonfinite", "num_clipped"), "*i32")
NUMBERS = dict.fromkeys(
    ("clipping", "eps", "min_norm", "grad_scale", "lr", "momentum", "weight_decay", "share"), "fp32"
)
TYPES = TABLES | SQUARES | COUNTS | NUMBERS


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("rows, block", tables.TILES)
@pytest.mark.parametrize("grad, aligned", [(tl.float32, True), (tl.bfloat16, True), (tl.float16, False)])
def test_norms_and_update_compile(grad: Any, aligned: bool, rows: int, block: int, capability: int) -> None:
    shared = {
        "GRAD": grad,
        "POINTER_ALIGN": 16 if aligned else 1,
        "LENGTH_ALIGN": 16 if aligned else 1,
        "ROWS": rows,
        "BLOCK": block,
    }
    norms = build(update_programs.unit_norms, TYPES, capability, **shared)
    clipped = build(
        update_programs.update, TYPES, capability, **shared, CLIP=True, AVERAGE=True, GATED=True, CHUNK=tables.CHUNK
    )
    for built in (norms, clipped):
        assert built.asm["cubin"]
        # The tables hide addresses from the compiler: without the hints every thread would load four bytes.
        assert ("ld.global.v4" in built.asm["ptx"]) == aligned
    left_out = {"factor_of": None, "gate": None, "CLIP": False, "AVERAGE": False, "GATED": False}
    assert build(update_programs.update, TYPES, capability, **shared, **left_out, CHUNK=tables.CHUNK).asm["cubin"]


@pytest.mark.parametrize("gated", [True, False])
def test_factors_compile(gated: bool) -> None:
    gate = {} if gated else {"gate": None}
    assert build(update_programs.factors, TYPES, GATED=gated, BLOCK=1024, **gate).asm["cubin"]
