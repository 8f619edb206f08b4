"""The ledger: addresses over what decides a result, entries whole, folders that belong to one sweep."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from transfer.sweep.entry import Trial, entry
from transfer.sweep.ledger import Ledger, SweepInfo

OF_A_TERABYTE = 1 << 40
TRIAL = Trial(
    kind="final",
    task="digits",
    method="finetune",
    init="pretrained",
    shots=5,
    seed=0,
    hyperparameters={"learning_rate": 0.1, "num_steps": 20},
    protocol_digest="p",
    checkpoint_digest="c",
    data_digest="d",
)
INFO = SweepInfo(
    suite="demo",
    suite_digest="s" * 64,
    checkpoint_url="runs/a",
    checkpoint_digest="c" * 64,
    model="nfnet_tiny",
    started_s=1.0,
    command="normfree transfer",
    hardware="none",
    num_seeds=3,
    not_run=[],
)
FIELDS = {
    *("digest", "kind", "task", "task_title", "method", "init", "shots", "seed", "metric", "value", "num_train"),
    *("num_test", "hyperparameters", "history", "seconds_s", "images_seen", "protocol_digest", "checkpoint_url"),
    *("checkpoint_digest", "data_digest", "status", "error", "backbone_digest", "metrics", "backbone", "model"),
    *("baselines", "test_interval", "measures", "classes_ordered"),
    *("method_kind", "method_title", "selection", "stopped_at", "grid", "config", "config_digest", "max_memory_bytes"),
    *("watts", "num_processes", "code_revision", "cause", "num_tries", "seal"),
}


def make(trial: Trial = TRIAL, **changes: Any) -> Any:
    return entry(trial, **{"task_title": "Digits", "checkpoint_url": "runs/a", "value": 0.5, **changes})


def test_the_address_is_over_everything_that_decides_the_result() -> None:
    changes: list[dict[str, Any]] = [
        {"kind": "search"},
        {"task": "mnist"},
        {"method": "ridge"},
        {"init": "scratch"},
        {"shots": 1},
        {"seed": 1},
        {"hyperparameters": {"learning_rate": 0.2, "num_steps": 20}},
        {"protocol_digest": "q"},
        {"checkpoint_digest": "e"},
        {"data_digest": "e"},
        {"backbone_digest": "b"},
        {"metric": "top5"},
    ]
    assert len(changes) == len(dataclasses.fields(Trial))
    assert len({TRIAL.digest, *(dataclasses.replace(TRIAL, **c).digest for c in changes)}) == len(changes) + 1
    # It survives the way to a worker and back.
    assert Trial(**json.loads(json.dumps(dataclasses.asdict(TRIAL)))).digest == TRIAL.digest


def test_a_finished_trial_is_one_file_with_its_address_as_name(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert not ledger.is_done(TRIAL) and ledger.find(TRIAL.digest) is None
    ledger.write(make(history=[{"step": 1, "time_s": 2.0, "loss": 3.0, "accuracy": 0.1}]))
    (path,) = (tmp_path / "trials").iterdir()
    assert path.name == f"{TRIAL.digest}.json" and set(json.loads(path.read_text())) == FIELDS
    assert ledger.is_done(TRIAL) and list(ledger.entries()) == [ledger.find(TRIAL.digest)]
    ledger.remove(TRIAL.digest)
    assert not list(ledger.entries())


def test_a_failed_trial_has_an_error_and_no_value_and_is_done_only_where_that_is_its_result(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    for changes in ({"error": "it broke"}, {"value": float("nan")}, {"value": None}):
        ledger.write(make(**changes))
        found = ledger.find(TRIAL.digest)
        assert found is not None and found.status == "failed" and found.value is None and found.error
        assert ledger.is_done(TRIAL) == ("value" in changes)  # no number at the end: it diverged


def test_rows_that_are_not_finite_do_not_reach_the_file() -> None:
    rows = [{"step": s, "time_s": 1.0, "loss": x, "accuracy": 0.1} for s, x in ((1, 2.0), (2, float("inf")))]
    assert [r["step"] for r in make(history=rows).history] == [1]


def test_a_value_that_json_has_not_is_not_written(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    with pytest.raises(ValueError, match="JSON"):
        ledger.write(dataclasses.replace(make(), value=float("nan")))
    assert list(ledger.entries()) == []


def test_a_from_scratch_trial_names_no_checkpoint() -> None:
    assert make(dataclasses.replace(TRIAL, init="scratch", checkpoint_digest="")).checkpoint_url == ""


def test_a_folder_belongs_to_one_checkpoint_and_one_suite(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.claim(INFO)
    again = ledger.claim(dataclasses.replace(INFO, num_seeds=5, started_s=9.0))
    assert again.started_s == 1.0 and ledger.info().num_seeds == 5
    for changes, which in (({"checkpoint_digest": "x"}, "checkpoint"), ({"suite_digest": "x"}, "suite")):
        with pytest.raises(UserError, match=f"of another {which} .*; give another folder with --out"):
            ledger.claim(dataclasses.replace(INFO, **changes))
    assert ledger.info().num_seeds == 5
    with pytest.raises(UserError, match="run 'normfree transfer' first"):
        Ledger(str(tmp_path / "none")).info()


def test_the_suite_that_a_sweep_began_with_is_kept_however_often_it_grows(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert ledger.claim(INFO).first_suite_digest == ""
    for before, now in (("s", "t"), ("t", "u")):
        ledger.claim(dataclasses.replace(INFO, suite_digest=now * 64), grown_from=before * 64)
        assert (ledger.info().suite_digest, ledger.info().first_suite_digest) == (now * 64, "s" * 64)


def test_what_runs_is_told_and_read_and_no_damage_of_it_is_a_fault(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert ledger.running() == []
    ledger.tell_running([{"name": "a", "since_s": 1.0}, {"name": "b", "since_s": 2.0}])
    assert ledger.running() == ["a", "b"]
    told = json.loads((tmp_path / "running.json").read_text())
    assert told["jobs"][1] == {"name": "b", "since_s": 2.0} and abs(told["time_s"] - time.time()) < 600
    for damaged in ("", "[]", '{"jobs": 3}', '{"jobs": [{}]}'):
        (tmp_path / "running.json").write_text(damaged)
        assert ledger.running() == []
    Ledger("/dev/null/x").tell_running([])


def test_a_sweep_may_grow_by_backbones_and_keeps_its_way_to_search(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    one, two = ({"name": n, "url": n, "digest": n * 64} for n in "ce")
    ledger.claim(dataclasses.replace(INFO, sources=[one]))
    ledger.claim(dataclasses.replace(INFO, sources=[one, two]))
    with pytest.raises(UserError, match="another checkpoint"):
        ledger.claim(dataclasses.replace(INFO, sources=[one]))
    with pytest.raises(UserError, match="--scheduler"):
        ledger.claim(dataclasses.replace(INFO, sources=[one, two], scheduler="none"))


def test_an_entry_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.write(make())
    path = tmp_path / "trials" / f"{TRIAL.digest}.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in content.items() if k not in ("metrics", "backbone", "cause", "seal")}))
    found = ledger.find(TRIAL.digest)
    assert found is not None and found.is_ok and found.metrics == {} and found.backbone == ""


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("value", 7.5, "at value: it needs a number <= 1"),
        ("value", -0.5, "at value: it needs a number >= 0"),
        ("value", True, "at value: it needs"),
        ("value", "0.9", "at value: it needs"),
        ("value", 0.995, "value is not what was written there"),
        ("value", None, "status 'ok' and value None"),
        ("metrics", {"top1": 75}, "metrics"),
        ("num_test", -1, "at num_test"),
        ("digest", "../../etc/passwd", "at digest: it needs"),
        ("seed", "<b>", "at seed"),
        ("status", "wins", "at status"),
        ("watts", {"<svg>": 3.0}, "watts is not what was written there"),
        ("hyperparameters", {"learning_rate": 0.2}, "hyperparameters is not what was written there"),
        ("seal", {}, "is not what was written there"),
    ],
)
def test_an_entry_that_is_not_what_was_written_is_refused_with_its_file_and_field(
    tmp_path: Path, field: str, value: object, words: str
) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.write(make())
    path = tmp_path / "trials" / f"{TRIAL.digest}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=words) as refused:
        list(ledger.entries())
    assert str(path) in str(refused.value)


def test_an_entry_under_another_name_or_of_another_trial_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.write(make())
    path = tmp_path / "trials" / f"{TRIAL.digest}.json"
    copied = path.with_name(f"zz{path.name}")
    copied.write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="under another name"):
        list(ledger.entries())
    copied.unlink()
    other = dataclasses.replace(TRIAL, seed=1)
    ledger.write(dataclasses.replace(make(), digest=other.digest))
    with pytest.raises(UserError, match="its name says another"):
        ledger.find(other.digest)


def test_a_damaged_sweep_json_is_named(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.claim(INFO)
    path = tmp_path / "sweep.json"
    whole = path.read_bytes()
    for data in (b"", whole[:100], b"[]", whole.replace(b'"num_seeds": 3', b'"num_seeds": "3"')):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"sweep\.json .*start the sweep again"):
            ledger.info()


def test_a_damaged_entry_is_named(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.write(make())
    path = tmp_path / "trials" / f"{TRIAL.digest}.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="delete this file"):
        ledger.is_done(TRIAL)


def test_a_sweep_grows_by_tasks_and_is_refused_other_data_under_a_tasks_name(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.claim(dataclasses.replace(INFO, data={"digits": "a" * 64}))
    assert set(ledger.claim(dataclasses.replace(INFO, data={"glyphs": "b" * 64})).data) == {"digits", "glyphs"}
    with pytest.raises(
        UserError, match="data for digits with digest aaaaaaaaaaaa, the data there now have cccccccccccc"
    ):
        ledger.claim(dataclasses.replace(INFO, data={"digits": "c" * 64}))


def test_only_a_value_or_a_failure_of_the_candidate_is_a_result() -> None:
    ok, diverged, lost = make(), make(value=float("nan")), make(value=None, error="killed", cause="lost")
    assert [e.is_ok for e in (ok, diverged, lost)] == [True, False, False]
    assert [e.lacks_result for e in (ok, diverged, lost)] == [False, False, True]
    assert not dataclasses.replace(ok, value=None).is_ok and not dataclasses.replace(ok, status="failed").is_ok


def test_what_an_earlier_version_did_not_write_has_the_value_that_it_had() -> None:
    found = make()
    assert (found.stopped_at, found.max_memory_bytes, found.num_processes, found.num_tries) == (0, 0, 1, 1)
    assert (INFO.scheduler, INFO.search) == ("asha", "grid")


def test_an_entry_that_is_far_too_large_is_named_before_it_fills_the_memory(tmp_path: Path) -> None:
    (tmp_path / "trials").mkdir()
    with open(tmp_path / "trials" / f"{TRIAL.digest}.json", "wb") as file:
        file.truncate(OF_A_TERABYTE)
    for read in (lambda: list(Ledger(str(tmp_path)).entries()), lambda: Ledger(str(tmp_path)).find(TRIAL.digest)):
        with pytest.raises(UserError, match="delete this file, its trial runs again"):
            read()
