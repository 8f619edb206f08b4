"""The package as others install it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["pipeline", "transfer", "orchestration"])
def test_a_package_of_the_same_name_that_is_found_first_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise SystemExit('a stranger was imported')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import normfree; normfree.program()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"'{name}'" in done.stderr and str(tmp_path) in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_runs_as_a_file_too(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "normfree.py"), "--help"], cwd=tmp_path, capture_output=True, check=True)
