"""The form of a suite's YAML as JSON Schema (2020-12), from the types that read it: for editors and checkers.

What depends on more than one field (a grid or a search, shots with the rule few_shot alone) is `load_suite`'s to refuse.
"""

import dataclasses
from typing import Any

import msgspec

from transfer.protocol.methods import METHOD_KINDS
from transfer.protocol.suite_files import SuiteFile
from transfer.protocol.tasks import TaskEntry


def schema() -> dict[str, Any]:
    """Of a whole file. Each method is one of the kinds' own forms, by its `kind` or, without one, by its name."""
    kinds = list(dict.fromkeys(settings for settings, *_ in METHOD_KINDS.values()))
    (_, task, *_), parts = msgspec.json.schema_components((SuiteFile, TaskEntry, *kinds), ref_template="#/$defs/{name}")
    for part in parts.values():
        part["additionalProperties"] = False
    forms: dict[str, Any] = {}
    for name, (settings, title, preset) in METHOD_KINDS.items():
        fields = {k: {**v, **_default(preset, k)} for k, v in parts[settings.__name__]["properties"].items()}
        properties = {"kind": {"const": name}, **fields}
        forms[name] = {"title": title, "type": "object", "properties": properties, "additionalProperties": False}
    fields = dict(parts.pop(SuiteFile.__name__)["properties"])
    fields["tasks"] = {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, task]}}
    by_kind = [{"$ref": f"#/$defs/method_{name}", "required": ["kind"]} for name in forms]
    by_name = {name: {"anyOf": [{"$ref": f"#/$defs/method_{name}"}, *by_kind]} for name in forms}
    fields["methods"] = {
        "type": "object",
        "minProperties": 1,
        "properties": by_name,
        "additionalProperties": {"anyOf": by_kind},
    }
    required = [f.name for f in dataclasses.fields(SuiteFile) if f.default is dataclasses.MISSING]
    parts[TaskEntry.__name__]["required"] = ["card"]  # holdout_per_class is the suite's where it has none of its own
    used = {k: v for k, v in parts.items() if k not in {kind.__name__ for kind in kinds}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "normfree suite",
        "type": "object",
        "properties": fields,
        "required": required,
        "additionalProperties": False,
        "$defs": used | {f"method_{name}": form for name, form in forms.items()},
    }


def _default(preset: dict[str, Any], field: str) -> dict[str, Any]:
    """What a kind of method sets where its settings have another default."""
    value = preset.get(field)
    return {} if field not in preset else {"default": list(value) if isinstance(value, tuple) else value}
