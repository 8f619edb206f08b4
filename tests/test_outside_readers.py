"""Small documents that somebody else may have written: each reader of them ends in a sentence, or counts the odd line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.spool import spool
from orchestration.tracking import lineage
from orchestration.tracking.translate import Translator
from pipeline.data.loading.sample_ledger import Ledger
from pipeline.data.verify.wds_labels import label_text
from pipeline.errors import UserError
from pipeline.training import rollback
from transfer.protocol.imagenet_labels import load_real
from transfer.results import contamination

DEEP = "[" * 100_000
HUGE = "[" + "9" * 6000 + "]"


def _ledger(path: Path) -> Any:
    ledger = Ledger.__new__(Ledger)
    ledger._data = SimpleNamespace(names=("a",))  # type: ignore[assignment]
    return ledger.read(str(path.parent), 5)


READERS: dict[str, Callable[[Path], Any]] = {
    "left_out.json": lambda path: rollback.read(str(path.parent)),
    "ledger.json": _ledger,
    "real.json": lambda path: load_real(str(path)),
    "pairs.json": lambda path: contamination._pairs(str(path)),
    "pairs.csv": lambda path: contamination._pairs(str(path)),
}


@pytest.mark.parametrize(
    "content", [DEEP, HUGE, "", "null", "[1]", '{"pairs": [{"split_b": [], "key_b": {}}]}', "\0,\xff\n", "7"]
)
@pytest.mark.parametrize("name", READERS)
def test_a_hostile_document_ends_in_a_sentence(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"real\.json|pairs|left_out|ledger"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    "page", [{}, {"source": "a", "epochs": [], "entries": []}, {"source": "a", "epochs": [0, 0], "entries": [{}]}]
)
def test_a_ledger_of_another_kind_is_refused(tmp_path: Path, page: dict[str, Any]) -> None:
    (tmp_path / "ledger.json").write_text(json.dumps({"pages": [page]}))
    with pytest.raises(UserError, match=r"ledger\.json"):
        _ledger(tmp_path / "ledger.json")


@pytest.mark.parametrize("text", [DEEP, HUGE, '{"label": NaN}', '{"label": 1, "label": 2}'])
def test_a_sample_s_json_is_refused_by_its_reason(text: str) -> None:
    with pytest.raises(ValueError, match="json"):
        label_text({"json": text.encode()})


def test_odd_lines_of_a_spool_are_counted_and_hold_up_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr(spool, "MAX_LINE_BYTES", 1 << 17)
    good = {"attempt": 1, "kind": "Notice", "text": "here", "time_s": 1.0}
    odd = [
        {"kind": []},
        {"kind": "Step", "parts": [1], "step": 1, "time_s": 1.0},
        {"kind": "Attempt", "attempt": 1, "time_s": 1e300},
        {"kind": "Notice", "text": "x", "time_s": float("inf")},
        {"kind": "Lost", "samples": [], "step": 1, "time_s": 1.0},
        {"kind": "Saved", "step": 1, "time_s": 1.0, "digest": "ab", "url": {"a": 1}},
        {"kind": "System", "node": "n", "values": 3, "step": 1, "time_s": 1.0},
    ]
    path = tmp_path / spool.MAIN
    path.write_text("\n".join([DEEP, '{"kind": "' + "x" * (1 << 18), *map(json.dumps, odd), json.dumps(good), ""]))
    follower, translator, found = spool.Follower(path), Translator(), []
    while lines := follower.poll():
        found += [translator.translate(line.value) for line in lines]
    assert translator.num_odd == len(odd)
    assert follower.num_unreadable == 2
    assert found[-1].tags == {"notice.last": "here"}


@pytest.mark.parametrize("text", [DEEP, "[]", '{"s": {"run_id": "<b>"}}', '{"s": {"run_id": ["a"]}}', '{"s": 1}'])
def test_an_account_that_is_none_links_to_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "tracking.json").write_text(text)
    assert lineage.origin(None, "", f"{tmp_path}/checkpoints/step_1") == lineage.Origin()
