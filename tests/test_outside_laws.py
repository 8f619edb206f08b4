"""What comes from outside meets one door each: laws over the syntax trees, with the few places that have a reason to pass by."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted(p for floor in ("nfnet", "pipeline", "transfer", "orchestration") for p in (ROOT / floor).rglob("*.py"))

PARSERS = {
    "pipeline/documents.py": "the door",
    "pipeline/yaml_files/parse.py": "the door of YAML",
    "nfnet/weights/files.py": "nfnet stands below the door; a safetensors header is bounded by its library",
    "orchestration/registry/served_model.py": "runs where normfree is not installed",
    "orchestration/spool/spool.py": "records may hold NaN; lines are bounded, and what cannot be read is counted",
    "orchestration/figures/run_figures.py": "a copy of what this process wrote",
    "orchestration/tune/trial_rank.py": "a pipe of this process's own child",
    "orchestration/tune/trial_group.py": "the same, the other end",
    "pipeline/storage/ownership.py": "a beat that is no record is none of ours",
    "pipeline/exchange/unix_store.py": "a socket that no other user reaches",
    "orchestration/run/rank_end.py": "what a rank of this process wrote",
    "orchestration/run/folded.py": "ranks of one host trust each other",
    "pipeline/supervision/collective_progress.py": "what torch says of this very process",
}
STARTERS = {
    "orchestration/child_process.py": "the door",
    "orchestration/cli.py": "this very program, anew in UTF-8",
    "pipeline/provenance.py": "git, on the own checkout alone",
    "orchestration/clusters/slurm.py": "sbatch and sinfo",
    "orchestration/clusters/ssh.py": "ssh",
    "orchestration/doctor/conversation.py": "the same",
}
LOADERS = {
    "nfnet/weights/safe_pickle.py": "the door: a table of its own in place of imports",
    "nfnet/weights/files.py": "torch.load of weights alone, after nfnet.weights.pickle_program has looked at the file",
    "transfer/arrays.py": "the door for arrays of sweeps: bounded, without pickles",
    "pipeline/data/sources/parquet.py": "sizes that this process wrote",
}


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """(file, what is called, the call)."""
    found = []
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        file = str(path.relative_to(ROOT))
        found += [(file, ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]
    return found


def users(*endings: str) -> set[str]:
    return {file for file, called, _ in calls() if called.endswith(endings)}


def test_documents_of_others_are_parsed_by_one_module() -> None:
    found = users("json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.load_all", "yaml.safe_load_all")
    assert found == set(PARSERS)


def test_processes_are_started_by_one_module() -> None:
    ways = (
        "subprocess.run",
        "Popen",
        "check_output",
        "check_call",
        "os.system",
        "os.popen",
        "os.fork",
        "os.posix_spawn",
        "create_subprocess_exec",
        "create_subprocess_shell",
    )
    assert users(*ways, "os.execv", "os.execve", "os.execvp", "os.execvpe", "os.spawnv") == set(STARTERS)
    shells = [file for file, _, call in calls() for k in call.keywords if k.arg == "shell"]
    assert not shells


def test_nothing_of_a_file_is_run() -> None:
    named = {
        file for file, called, _ in calls() if called in ("eval", "exec", "compile", "pickle.load", "pickle.loads")
    }
    assert not named
    assert users("np.load", "numpy.load", "torch.load", ".Unpickler", "_Unpickler") == set(LOADERS)
    for file, called, call in calls():
        words = {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert called != "torch.load" or words.get("weights_only") == "True", file
        assert words.get("allow_pickle", "False") == "False", file


def is_neutral(node: ast.expr) -> bool:
    """Numbers and constants aside, through `terminal` or json.dumps (ASCII); `line` and `text` hold what `terminal` made."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) in ("'\\n'", "''")
    ):
        return "terminal" in ast.unparse(node)  # a join
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("terminal", "json.dumps", "version", "type", "page")
    if isinstance(node, ast.JoinedStr):
        return all(is_neutral(part.value) for part in node.values if isinstance(part, ast.FormattedValue))
    if isinstance(node, ast.IfExp):
        return is_neutral(node.body) and is_neutral(node.orelse)
    if isinstance(node, ast.Attribute):
        return is_neutral(node.value)
    return isinstance(node, ast.Constant) or ast.unparse(node) in ("line", "text")


def test_what_is_printed_is_neutral_to_a_terminal() -> None:
    printed = [(file, call) for file, called, call in calls() if called == "print"]
    assert not [f"{file}:{call.lineno}" for file, call in printed if not all(map(is_neutral, call.args))]


def test_templates_escape_by_themselves() -> None:
    assert not [
        p.name for p in ROOT.rglob("*.j2") if ".venv" not in p.parts and ("|safe" in p.read_text().replace(" ", ""))
    ]
    made = [call for _, called, call in calls() if called.split(".")[-1] == "Environment"]
    assert [ast.unparse(k.value) for call in made for k in call.keywords if k.arg == "autoescape"] == ["True"]
