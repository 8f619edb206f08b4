"""Suites as YAML files: ours by name, anybody's by path; and a suite that grows in the folder of its sweep."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.configuration import from_dict, nearest
from pipeline.errors import UserError
from pipeline.field_types import Count, Text
from pipeline.storage import objects
from pipeline.yaml_files.parse import parse_yaml, read_yaml
from pipeline.yaml_files.refusals import located, within
from transfer.protocol.methods import Method, parse_methods
from transfer.protocol.tasks import Suite, TaskEntry, not_prepared, open_task


def suites_dir() -> Path:
    return Path(__file__).parents[1] / "suites"


def list_suites() -> list[str]:
    return sorted(p.stem for p in suites_dir().glob("*.yaml"))


def _is_path(name_or_path: str) -> bool:
    return "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def load_suite(name_or_path: str) -> Suite:
    """The suite of that name, or of the YAML file at that path. UserError for unknown names, keys and wrong values."""
    if _is_path(name_or_path):
        path = name_or_path
        if not objects.is_file(path):
            raise UserError(f"no suite at {path}; give the path of a YAML suite or one of {', '.join(list_suites())}")
    elif name_or_path in list_suites():
        path = str(suites_dir() / f"{name_or_path}.yaml")
    else:
        raise UserError(f"no suite is called {name_or_path!r}; {nearest(name_or_path, list_suites())}")
    where, data = f"the suite {path}", read_yaml(path)
    return suite_of(parse_yaml(data, where), where, data)


@dataclass(frozen=True, kw_only=True)
class SuiteFile:
    """A suite as YAML holds it."""

    name: Text
    title: str = ""
    """For people; empty = the name."""
    num_seeds: Count = 3
    """Supports drawn for each cell."""
    holdout_per_class: Count = 10
    """Of tasks that do not set their own."""
    tasks: list[str | dict[str, Any]]
    """Cards, by name or path; or mappings with the fields of a task."""
    methods: dict[str, Any]
    """Name -> settings, and its `kind` where the name is not one."""


def suite_of(content: Any, where: str, data: bytes | None = None) -> Suite:
    """The suite from plain containers, as YAML holds them or `Suite.plain` gives them. Args: data: the YAML, for its lines."""
    with located(where, data):
        file = from_dict(SuiteFile, content)
        if not file.tasks:
            raise UserError.at("tasks", "tasks is empty; set it to a list of card names")
        entries: dict[str, TaskEntry] = {}
        for number, task in enumerate(file.tasks):
            place = f"tasks[{number}]"
            configured = task if isinstance(task, dict) else {"card": task}
            entry = from_dict(TaskEntry, {"holdout_per_class": file.holdout_per_class, **configured}, place)
            with within(f"{place}.card"):  # unknown names are refused now, with the nearest ones
                name = entry.name
            if name in entries:
                raise UserError.at(
                    place, f"{place} is the task {name} again; leave it out, or give it a label of its own"
                )
            entries[name] = entry
        methods = parse_methods(file.methods, where)
    title = file.title or file.name
    return Suite(name=file.name, title=title, tasks=tuple(entries.values()), methods=methods, num_seeds=file.num_seeds)


def refuse_tasks(suite: Suite, data_root: str, name_or_path: str = "") -> None:
    """UserError if the datasets give nothing that the suite asks for; before any weights are looked at.

    Args:
        name_or_path: as of `load_suite`; of a file the line is told.
    """
    reasons: list[tuple[str, str]] = []  # and the place in the suite
    for asked in suite.tasks:
        if (reason := not_prepared(asked, data_root)) is not None:
            reasons.append((f"tasks[{asked.card}]", f"{asked.name}: {reason}"))
            continue
        task = open_task(asked, data_root)
        why = [(m.name, task.cannot(m.settings, shots)) for m in suite.methods for shots in m.settings.columns]
        if None in (reason for _, reason in why):
            return
        reasons += [(f"methods.{method}", reason) for method, reason in why if reason]
    place, reason = reasons[0]
    sentence = f"the suite {suite.name} has nothing that these datasets can give: {reason}"
    if not _is_path(name_or_path):
        raise UserError(sentence)
    with located(name_or_path, read_yaml(name_or_path)):
        raise UserError.at(place, sentence)


def grown(there: Suite, asked: Suite, where: str) -> Suite:
    """Both as one: tasks, methods and numbers of images that either has. What both have must be the same.

    Args:
        where: the folder of the sweep, for messages.
    Raises:
        UserError: they have another name, or a task or a method of one name is configured in two ways.
    """
    if there.name != asked.name:
        raise UserError(
            f"{where} holds a sweep of another suite ({there.name}), not of {asked.name}; give another folder with --out"
        )
    tasks = {t.name: t for t in there.tasks}
    for task in asked.tasks:
        old = tasks.setdefault(task.name, task)
        if replace(old, data=task.data) != task:
            raise _differs(where, f"task {task.name}", old.plain(), task.plain())
        tasks[task.name] = task  # its data may lie elsewhere now
    methods = {m.name: m for m in there.methods}
    for method in asked.methods:
        methods[method.name] = _with_shots(methods.get(method.name, method), method, where)
    order = [
        m.name for m in parse_methods({m.name: {"kind": m.kind, **m.configured()} for m in methods.values()}, where)
    ]
    return replace(asked, tasks=tuple(tasks.values()), methods=tuple(methods[name] for name in order))


def _with_shots(old: Method, new: Method, where: str) -> Method:
    shots = tuple(sorted({*old.settings.shots, *new.settings.shots}))
    both = [
        replace(m, settings=replace(m.settings, shots=shots)) if shots and m.settings.shots else m for m in (old, new)
    ]
    if both[0] != both[1]:
        raise _differs(where, f"method {new.name}", old.configured(), new.configured())
    return both[1]


def _differs(where: str, what: str, old: dict[str, Any], new: dict[str, Any]) -> UserError:
    names = [k for k in {**old, **new} if k != "shots" and old.get(k) != new.get(k)]
    values = ", ".join(f"{k} ({old.get(k)} there, {new.get(k)} now)" for k in names)
    return UserError(
        f"{where} holds a sweep of another suite of this name: its {what} differs in {values}; "
        "rename what is new, or give another folder with --out"
    )
