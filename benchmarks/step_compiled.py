"""`benchmarks.step` with both networks compiled as well."""

from benchmarks import step


def main() -> None:
    step.main(compiled=True)
