"""Records of a sweep, made up or edited for tests."""

import json
from pathlib import Path
from typing import Any


def edit_entry(path: Path, **changed: Any) -> None:
    """As an earlier version would have written it: without a seal."""
    entry = {k: v for k, v in json.loads(path.read_text()).items() if k != "seal"}
    path.write_text(json.dumps({**entry, **changed}))


def sweep_json(**fields: Any) -> str:
    """A whole sweep.json with these fields."""
    text = dict.fromkeys(
        ("suite", "suite_digest", "checkpoint_url", "checkpoint_digest", "model", "command", "hardware"), ""
    )
    return json.dumps({**text, "started_s": 1.7e9, "num_seeds": 3, "not_run": [], **fields})


def selection_json(**fields: Any) -> str:
    """A whole selection record with these fields; candidates may lack some of theirs."""
    text = dict.fromkeys(("task", "method", "protocol_digest", "data_digest", "checkpoint_digest"), "")
    usual = {"score": None, "loss": None, "step": 0, "status": "ok", "digest": ""}
    rows = [{**usual, **row} for row in fields.pop("candidates", [])]
    return json.dumps({**text, "init": "pretrained", "shots": 5, "time_s": 1.7e9, **fields, "candidates": rows})
