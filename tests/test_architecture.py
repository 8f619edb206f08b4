"""The laws of the house, over the syntax trees."""

import ast
import subprocess
import sys
from functools import cache
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
        "orchestration/figures/scaling_figure.py",
        "pipeline/data/sources/glyphs.py",
    ),
    "jinja2": ("transfer/report/html_template.py",),
    "timm": (
        "pipeline/engine/optimisers.py",
        "pipeline/models/timm_models.py",
        "orchestration/commands/inspect.py",
        "pipeline/export/to_timm.py",
    ),
    "onnx": ("pipeline/export/to_onnx.py",),
    "onnxruntime": ("pipeline/export/to_onnx.py", "orchestration/registry/served_model.py"),
    "huggingface_hub": ("orchestration/registry/hub.py",),
    "ray": ("orchestration/tune/",),
    "optuna": ("transfer/search/optuna_search.py",),
    "mlflow": (
        "orchestration/tracking/mlflow_client.py",
        "orchestration/tracking/tracking_uri.py",
        "orchestration/serve/mlflow_server.py",
        "orchestration/serve/team_guard.py",
        "orchestration/registry/versions.py",
        "orchestration/registry/export_mlflow.py",
        "orchestration/registry/served_model.py",
    ),
}
FILES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    """All nodes of a file: each file is parsed once, and read by many laws."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    nodes = ast.parse(path.read_text()).body if top_level_only else nodes_of(path)
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


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other: a name may be in a circle only if it reaches itself."""

    def reached(start: str) -> set[str]:
        found: set[str] = set()
        todo = list(graph[start])
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo += graph.get(name, ())
        return found

    reach = {name: reached(name) for name in graph}
    groups = {tuple(sorted(m for m in reach[n] if m in graph and n in reach[m])) for n in graph if n in reach[n]}
    return [list(group) for group in sorted(groups)]


def modules() -> dict[str, set[str]]:
    """By module: the modules that it imports, also inside functions."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES if p.name != "__init__.py"}
    return {n: imports(p) & set(names) - {n} for n, p in names.items()}


def room(module: str) -> str:
    """Its folder; a module in a folder that has folders is a room of its own."""
    folder = (ROOT / module.replace(".", "/")).parent
    return module if any(p.is_dir() for p in folder.glob("[a-z]*")) else module.rpartition(".")[0]


def test_neither_modules_nor_rooms_import_each_other_in_circles() -> None:
    graph = modules()
    assert circles(graph) == []
    rooms: dict[str, set[str]] = {}
    for module, imported in graph.items():
        rooms.setdefault(room(module), set()).update({room(m) for m in imported} - {room(module)})
    assert circles(rooms) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def test_no_folder_has_more_than_12_files_and_no_file_more_than_300_lines() -> None:
    folders = {p.parent for p in FILES}
    sizes = {str(f.relative_to(ROOT)): sum(p.name != "__init__.py" for p in f.glob("*.py")) for f in folders}
    assert {f: n for f, n in sizes.items() if n > 12} == {}
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert {f: n for f, n in lines.items() if n > 300} == {}


def test_no_function_has_more_than_60_lines() -> None:
    found = set()
    for path in FILES:
        for node in nodes_of(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 60:
                found.add(f"{path.relative_to(ROOT)}: {node.name}")
    assert found == set()


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_benchmarks_measure_what_a_run_executes(path: Path) -> None:
    """Every function and class that a benchmark imports from a module of ours is used by another module of ours."""
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in FILES}
    for node in nodes_of(path):
        if isinstance(node, ast.ImportFrom) and node.module in names:
            for name in (a.name for a in node.names if f"{node.module}.{a.name}" not in names and not a.name.isupper()):
                assert name in used_outside(node.module), f"{node.module}.{name} is used by benchmarks only"


@cache
def used_outside(module: str) -> set[str]:
    """Names of a module that others import from it or take as its attributes."""
    found: set[str] = set()
    last = module.rpartition(".")[2]
    for path in FILES:
        if ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") == module:
            continue
        aliases = set()
        for node in nodes_of(path):
            if isinstance(node, ast.ImportFrom) and node.module == module:
                found |= {a.name for a in node.names}
            elif isinstance(node, ast.ImportFrom) and f"{node.module}.{last}" == module:
                aliases |= {a.asname or a.name for a in node.names if a.name == last}
        for node in nodes_of(path):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
                found.add(node.attr)
    return found


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
