"""Small documents that somebody else may have written: each reader of them ends in a sentence, or counts the odd line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.cli import main
from orchestration.spool import spool
from orchestration.tracking import lineage
from orchestration.tracking.translate import Translator
from pipeline import recipes
from pipeline.data.loading.sample_ledger import Ledger
from pipeline.data.sources import cards
from pipeline.data.verify.wds_labels import label_text
from pipeline.errors import UserError
from pipeline.training import rollback
from pipeline.training.run import dump_yaml, load_yaml
from tests.fuzzing import fuzz, mutants
from transfer.protocol.imagenet_labels import load_real
from transfer.protocol.suite_files import load_suite, suites_dir
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


SPOOL = b"".join(
    json.dumps({"attempt": 1, **line}).encode() + b"\n"
    for line in (
        {"kind": "Attempt", "time_s": 1.0, "host": "h", "pid": 1, "commit": "ab"},
        {"kind": "Started", "step": 0, "total_steps": 9, "config": {"a": [1, "x"]}, "run_name": "r"},
        {"kind": "Step", "step": 1, "samples": 8, "loss": 1.5, "parts": {"forward": 0.1}, "time_s": 2.0},
        {"kind": "Saved", "step": 1, "time_s": 3.0, "digest": "a" * 64, "url": "c/step_1"},
        {"kind": "System", "node": "n", "values": {"cpu": 0.5}, "step": 1, "time_s": 3.0},
        {
            "kind": "Finished",
            "step": 1,
            "checkpoint": None,
            "seconds_s": 1.0,
            "evaluation": {"top1": 0.5},
            "time_s": 4.0,
        },
        {"kind": "Failed", "time_s": 5.0, "error": "E"},
    )
)


def _read_spool(path: Path) -> None:
    """As the uploader reads it, and as an attempt that goes on with the run adds to it."""
    follower, translator = spool.Follower(path), Translator()
    while lines := follower.poll():
        for line in lines:
            translator.translate(line.value)
    spool.Spool(path).close()


FUZZED: dict[str, tuple[Callable[[Path], object], list[bytes]]] = {
    spool.MAIN: (_read_spool, [SPOOL]),
    "card.yaml": (
        lambda path: cards._read.__wrapped__(str(path)),
        [(cards.datasets_dir() / f"{name}.yaml").read_bytes() for name in ("glyphs", "pneumoniamnist")],
    ),
    "suite.yaml": (
        lambda path: load_suite(str(path)),
        [(suites_dir() / f"{name}.yaml").read_bytes() for name in ("demo", "demo_search")],
    ),
    "run.yaml": (
        lambda path: load_yaml(path.read_bytes(), str(path)),
        [dump_yaml(recipes.get(name)).encode() for name in ("nfnet_tiny_glyphs", "nfnet_f0_imagenet")],
    ),
}
YAML_TOKENS = [
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!python/object:os.system ",
    b"? ",
    b"- ",
    b": ",
    b"{",
    b"010",
    b".nan",
    b"1:30",
]
SPOOL_TOKENS = [b'"attempt": 1e999', b'"attempt": []', b'"step": null', b"NaN", b"Infinity", b"{}", b"\n"]


@pytest.mark.parametrize("num", [150, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUZZED)
def test_no_bytes_of_a_document_hurt(tmp_path: Path, name: str, num: int) -> None:
    reader, seeds = FUZZED[name]

    def read(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        reader(tmp_path / name)

    counts = fuzz(read, mutants(seeds, num, tokens=SPOOL_TOKENS if name == spool.MAIN else YAML_TOKENS), tmp_path)
    assert counts["read"] and (counts["refused"] or name == spool.MAIN)


BOMB = "classes:\n- &b0 [" + ", ".join(["lol"] * 9) + "]\n"
BOMB += "".join(f"- &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize("bomb", [BOMB, "[" * 5000, "a: &a [*a]\n", "x: " + "y" * (5 << 20)])
@pytest.mark.parametrize(
    "words",
    [
        "data prepare {} --source any.tar --out {}.out",
        "transfer timm:convnext_atto --suite {} --out {}.out --data-root data",
        "pretrain {} --out {}.out",
    ],
)
def test_a_yaml_bomb_ends_a_command_at_once_with_a_sentence(
    tmp_path: Path, words: str, bomb: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bomb.yaml"

    def command(data: bytes) -> None:
        path.write_bytes(data)
        assert main(words.replace("{}", str(path)).split()) == 2

    fuzz(command, [b"a: 1\n", bomb.encode()], tmp_path)
    said = capfd.readouterr().err
    assert said.count("bomb.yaml") >= 3 and "fault of ours" not in said, said


@pytest.mark.parametrize("name", ["card.yaml", "suite.yaml"])
def test_a_yaml_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)  # of holes
    with pytest.raises(UserError, match=rf"{name} is larger than 4 MiB"):
        FUZZED[name][0](tmp_path / name)
