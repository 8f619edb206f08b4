"""A bucket that answers 503 for longer than anybody waits: a count or one sentence, and nothing half-made that looks whole."""

import asyncio
import errno
from pathlib import Path
from typing import Any

import pytest

from orchestration.cli import main
from pipeline.data.format.manifest import Manifest
from pipeline.data.loading.datasets import TrainData
from pipeline.data.process_pool import each
from pipeline.storage import clients, objects, range_reads, store_errors
from tests.fault_proxy import Fault
from tests.pipeline.storage.test_lanes_in_store import AUGMENT, BATCH, _room, config  # noqa: F401
from tests.pipeline.storage.test_stream import Store, store  # noqa: F401

ENDLESS = 10**6


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(range_reads, "_gates", {})
    monkeypatch.setattr(range_reads, "MAX_WAIT_S", 0.01)
    monkeypatch.setattr(range_reads, "PATIENCE_S", 0.2)
    real = asyncio.sleep

    async def at_once(*_: Any) -> None:
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", at_once)  # s3fs and the client under it wait for long
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


def test_a_block_that_was_given_up_is_counted_and_leaves_nothing_behind(store: Store, tmp_path: Path) -> None:  # noqa: F811
    data = TrainData(config(store.copy(), tmp_path), AUGMENT, seed=3, global_batch=BATCH)
    samples, reader = data.draw(0, BATCH)[1].tolist(), data.sources.readers[0]

    def contents() -> list[Any]:
        return [reader.read(request)[s] for s in samples[:4] for request in reader.requests([s])]

    store.proxy.faults.append(Fault("GET .*tar", times=ENDLESS, status=503))
    assert all("its shard cannot be read" in str(content) for content in contents())
    assert range_reads.gate().num_overloads > 4
    store.proxy.faults.clear()
    local = TrainData(config(store.local, tmp_path), AUGMENT, seed=3, global_batch=BATCH).sources.readers[0]
    assert contents() == [local.read(request)[s] for s in samples[:4] for request in local.requests([s])]


def _busy(_: int) -> None:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}
    raise OSError(errno.EBUSY, "later") from ClientError(answer, "PutObject")  # as s3fs says it


def test_a_worker_process_that_gives_a_store_up_is_understood() -> None:
    with pytest.raises(OSError) as raised:
        list(each(_busy, [1, 2], 2))
    assert "the object store does not answer" in (store_errors.silence(raised.value) or "")


@pytest.mark.parametrize("busy", ["manifest.json", "train-000001.tar"])
def test_a_dataset_whose_bucket_takes_nothing_is_none_until_the_command_is_run_again(
    busy: str,
    store: Store,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = f"s3://bucket/busy-{busy}"
    words = ["data", "prepare", "digits", "--out", out, "--shard-mb", str((1 << 18) / 1e6), "--workers", "1"]
    store.proxy.faults.append(Fault(f"PUT .*/{busy}", times=ENDLESS, status=503))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "the object store does not answer" in said and "the same command goes on then" in said
    assert not objects.exists(f"{out}/manifest.json")
    store.proxy.faults.clear()
    assert main(words) == 0 and Manifest.open(out).digest == Manifest.open(store.local).digest
