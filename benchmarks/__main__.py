"""All benchmarks, ours and the peer's in turn: python -m benchmarks [NAME ...] (or make bench)."""

import importlib
import sys

NAMES = (
    "update",
    "step",
    "loader",
    "order",
    "mixing",
    "overlap",
    "stream",
    "engine",
    "typed_run",
    "checkpoint",
    "object_copy",
    "tracking",
    "big_step",
    "step_compiled",
    "heads",
    "gpu",
    "sweep",
)

if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        importlib.import_module(f"benchmarks.{name}").main()
