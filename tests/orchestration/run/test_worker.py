"""One rank of a run as a process: who says why it was refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestration.run import worker
from pipeline.errors import UserError
from pipeline.recipes import get

WORLD = {"WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(("rank", "local_rank", "says"), [("0", "0", True), ("1", "1", False), ("2", "0", True)])
def test_one_rank_of_each_machine_says_why_a_run_is_refused(
    rank: str,
    local_rank: str,
    says: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def refused(*_: Any, **__: Any) -> Iterator[None]:
        raise UserError("set --out to a folder that all machines share")
        yield

    for name, value in {**WORLD, "RANK": rank, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("pipeline.training.train.train", refused)
    out = str(tmp_path / "run")
    assert worker.run_worker(get("nfnet_tiny_glyphs"), out, tracking_uri=None, debug=False) == worker.EXIT_USER
    assert ("set --out to a folder" in capfd.readouterr().err) == says


def test_a_store_that_is_away_is_no_failed_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from botocore.exceptions import EndpointConnectionError

    def away(*_: Any, **__: Any) -> Iterator[None]:
        raise EndpointConnectionError(endpoint_url="http://store:1/bucket")
        yield

    monkeypatch.setattr("pipeline.training.train.train", away)
    out = str(tmp_path / "run")
    assert worker.run_worker(get("nfnet_tiny_glyphs"), out, tracking_uri=None, debug=False) == worker.EXIT_OURS
    assert "the object store does not answer" in capfd.readouterr().err
