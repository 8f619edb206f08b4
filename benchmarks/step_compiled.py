"""`benchmarks.step` with both networks compiled as well."""

from __future__ import annotations

from benchmarks import step


def main() -> None:
    step.main(compiled=True)
