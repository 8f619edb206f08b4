"""The package as others install it."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import normfree

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


def test_an_installation_of_the_networks_alone_says_what_the_command_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "ray" else real(name, *more))
    assert normfree.problem().endswith("pip install 'normfree[cli]'") and "needs ray," in normfree.problem()


def test_the_networks_need_what_the_package_requires_and_nothing_else() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {text.partition(">")[0] for text in content["dependencies"]} == {"torch", "safetensors", "numpy"}
    names = {"deepspeed", "fsspec", "mlflow", "ray", "yaml", "pyarrow", "scipy", "sklearn", "msgspec", "rich"}
    code = f"import sys\nfor n in {sorted(names)!r}: sys.modules[n] = None\n"
    code += "import nfnet; nfnet.create_model('nfnet_tiny')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_both_lists_of_pinned_versions_name_the_same() -> None:
    lists = [Path(__file__).parents[1] / name for name in ("constraints.txt", "requirements-hashed.txt")]
    pinned, hashed = (set(re.findall(r"^[\w.-]+==[^\s;]+", path.read_text(), re.MULTILINE)) for path in lists)
    assert len(pinned) > 100 and {line.lower().replace("_", "-") for line in pinned} ^ hashed == set()
