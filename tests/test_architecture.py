"""The laws of the house, over the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {"nfnet": 0, "pipeline": 1, "transfer": 2, "orchestration": 3}
HOMES = {
    "deepspeed": ("pipeline/engine/deepspeed_engine.py", "pipeline/engine/zero_layout.py"),
    "fsspec": ("pipeline/storage/clients.py",),
    "safetensors": ("nfnet/weights/files.py", "pipeline/checkpoint/load.py"),
    "webdataset": ("pipeline/data/",),
    "triton": ("nfnet/kernels/",),
    "matplotlib": (
        "transfer/report/plots.py",
        "transfer/report/plot_style.py",
        "orchestration/figures/signal_figure.py",
        "orchestration/figures/run_figures.py",
        "pipeline/data/sources/glyphs.py",
    ),
    "jinja2": ("transfer/report/html_template.py",),
    "timm": ("pipeline/models/timm_models.py", "orchestration/commands/inspect.py", "pipeline/export/to_timm.py"),
    "onnx": ("pipeline/export/to_onnx.py",),
    "onnxruntime": ("pipeline/export/to_onnx.py", "orchestration/registry/served_model.py"),
    "ray": ("orchestration/tune/",),
    "optuna": ("transfer/search/optuna_search.py",),
    "mlflow": (
        "orchestration/tracking/mlflow_client.py",
        "orchestration/tracking/tracking_uri.py",
        "orchestration/serve/own_server.py",
        "orchestration/registry/versions.py",
        "orchestration/registry/export_mlflow.py",
        "orchestration/registry/served_model.py",
    ),
}
FILES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards_only(path: Path) -> None:
    floor = FLOORS[path.relative_to(ROOT).parts[0]]
    above = {n for n in imports(path) if FLOORS.get(n.split(".")[0], -1) > floor}
    assert not above


def test_modules_import_each_other_without_circles() -> None:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {n: imports(p, top_level_only=True) & set(names) - {n} for n, p in names.items()}
    # A module that imports its own package's face is no circle as long as the face does not import it back.
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("library", HOMES)
def test_a_heavy_library_has_one_home(library: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in FILES if library in {n.split(".")[0] for n in imports(p)}}
    assert users and not {u for u in users if not u.startswith(HOMES[library])}


def test_the_networks_need_torch_only() -> None:
    paths = list((ROOT / "nfnet").rglob("*.py"))
    first = [p for p in paths if not p.name.endswith("_kernels.py")]  # Triton's own, imported when one is launched
    roots = {n.split(".")[0] for p in first for n in imports(p, top_level_only=True)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "nfnet"}
    # Files of weights are read and written with safetensors, imported when one is.
    roots = {n.split(".")[0] for p in paths for n in imports(p)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "nfnet", "safetensors", "triton"}


def test_the_networks_load_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import nfnet, nfnet.kernels.triton_layers; nfnet.create_model('nfnet_tiny')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_datasets_holds_no_python() -> None:
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom orchestration.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'deepspeed', 'numpy', 'fsspec', 'yaml', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip().splitlines()[-1] == "[]"
