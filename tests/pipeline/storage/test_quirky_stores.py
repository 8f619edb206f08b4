"""Stores that are merely compatible with S3: what they refuse or show late ends no run and is told in one sentence."""

import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import commit as checkpoint
from pipeline.checkpoint import retention
from pipeline.errors import UserError
from pipeline.storage import clients, objects, range_reads, store_errors

RUN = "s3://bucket/run"
FACTS = {
    "samples": 1,
    "num_updates": 1,
    "shapes": {},
    "config": {},
    "config_digest": "",
    "evaluation": {},
    "dataset": {},
    "classes": [],
}


class Store(BaseHTTPRequestHandler):
    """S3 in memory. `quirk(request, operation, key)` may answer itself: (status, body)."""

    protocol_version = "HTTP/1.1"  # answers "Expect: 100-continue"
    held: dict[str, bytes]
    log: list[tuple[str, str]]
    quirk: Callable[["Store", str, str], tuple[int, bytes] | None]

    def do_GET(self) -> None:
        place, _, query = self.path.partition("?")
        key = urllib.parse.unquote(place.removeprefix("/bucket")).lstrip("/")
        asked = urllib.parse.parse_qs(query, keep_blank_values=True)
        operation = {"POST": "DELETE MANY", "GET": "GET" if key else "LIST"}.get(self.command, self.command)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.log.append((operation, key))
        status, body = type(self).quirk(self, operation, key) or self.serve(operation, key, asked)
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"tag"')
        self.send_header("Date", getattr(self, "date", formatdate(usegmt=True)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def serve(self, operation: str, key: str, asked: dict[str, list[str]]) -> tuple[int, bytes]:
        if operation == "PUT":
            self.held[key] = self.body
        elif operation == "DELETE":
            self.held.pop(key, None)
        elif operation == "DELETE MANY":
            keys = re.findall(r"<Key>(.*?)</Key>", self.body.decode())
            gone = "".join(f"<Deleted><Key>{k}</Key></Deleted>" for k in keys if self.held.pop(k, None) is not None)
            return 200, f"<DeleteResult>{gone}</DeleteResult>".encode()
        elif operation == "LIST":
            found = [k for k in sorted(self.held) if k.startswith(asked.get("prefix", [""])[0])]
            return 200, "".join(
                ["<ListBucketResult><IsTruncated>false</IsTruncated>"]
                + [f"<Contents><Key>{k}</Key><Size>{len(self.held[k])}</Size></Contents>" for k in found]
                + ["</ListBucketResult>"]
            ).encode()
        elif key not in self.held:
            return error(404, "NoSuchKey")
        else:
            return 200, self.held[key]
        return 200, b""

    def log_message(self, *_: Any) -> None:
        pass


def error(status: int, code: str, message: str = "") -> tuple[int, bytes]:
    return status, f"<Error><Code>{code}</Code><Message>{message or code}</Message></Error>".encode()


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    import s3fs

    with pytest.MonkeyPatch.context() as patch, ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        for name, value in (
            ("ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}"),
            ("ACCESS_KEY_ID", "key"),
            ("SECRET_ACCESS_KEY", "secret"),
            ("DEFAULT_REGION", "us-east-1"),
            ("MAX_ATTEMPTS", "1"),
        ):
            patch.setenv(f"AWS_{name}", value)
        patch.setattr(clients, "FIRST_WAIT_S", 0.01)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()


@pytest.fixture
def store(server: None, monkeypatch: pytest.MonkeyPatch) -> type[Store]:
    """An empty one without quirks."""
    Store.held, Store.log, Store.quirk = {}, [], lambda *_: None
    monkeypatch.setattr(clients, "_written", {})
    return Store


def late(operations: tuple[str, ...], times: int) -> Callable[..., tuple[int, bytes] | None]:
    """The first `times` of these requests for an object that is there are answered 404."""
    left = [times]

    def quirk(request: Store, operation: str, key: str) -> tuple[int, bytes] | None:
        if operation in operations and key in request.held and left[0]:
            left[0] -= 1
            return error(404, "NoSuchKey")
        return None

    return quirk


@pytest.mark.parametrize("times", [1, 6])
def test_an_object_that_we_have_just_written_is_asked_for_again(times: int, store: type[Store]) -> None:
    store.quirk = late(("HEAD",), times)
    objects.write_bytes("s3://bucket/x", b"1")
    assert [operation for operation, _ in store.log].count("PUT") == 1
    for ask in (objects.exists, objects.is_file, objects.size_bytes, objects.read_bytes, range_reads.version):
        store.quirk = late(("HEAD", "GET"), times)
        assert ask("s3://bucket/x"), ask


def test_an_object_that_is_not_ours_or_that_we_deleted_is_asked_for_once(store: type[Store]) -> None:
    objects.write_bytes("s3://bucket/x", b"1")
    objects.write_bytes("s3://bucket/run/x", b"1")
    objects.remove("s3://bucket/x")
    objects.remove_tree("s3://bucket/run")
    for url in ("s3://bucket/x", "s3://bucket/run/x", "s3://bucket/other"):
        store.log.clear()
        assert not objects.exists(url)
        assert [operation for operation, _ in store.log].count("HEAD") == 1


def test_a_write_that_never_shows_is_one_sentence(store: type[Store]) -> None:
    store.quirk = late(("HEAD",), 10**6)
    with pytest.raises(UserError, match="took s3://bucket/x and does not show it"):
        objects.write_bytes("s3://bucket/x", b"1")
    assert len([operation for operation, _ in store.log if operation == "HEAD"]) == clients.MAX_TRIES_PATIENT


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "MissingContentMD5"),
        error(501, "NotImplemented"),
        (200, b"<DeleteResult><Error><Key>x</Key><Code>AccessDenied</Code></Error></DeleteResult>"),
        (200, b"<DeleteResult></DeleteResult>"),
    ],
    ids=["md5", "unknown", "of another key", "silent"],
)
def test_what_delete_objects_does_not_delete_goes_key_by_key(refusal: tuple[int, bytes], store: type[Store]) -> None:
    store.held.update({"run/a": b"1", "run/b/c": b"1", "runs": b"1"})
    store.quirk = lambda _, operation, __: refusal if operation == "DELETE MANY" else None
    objects.remove_tree(RUN)
    assert set(store.held) == {"runs"}


def keeping(part: str) -> Callable[..., tuple[int, bytes] | None]:
    """Keys with `part` in them cannot be deleted; DeleteObjects says so within a 200."""

    def quirk(request: Store, operation: str, key: str) -> tuple[int, bytes] | None:
        if operation == "DELETE" and part in key:
            return error(403, "AccessDenied")
        if operation == "DELETE MANY":
            keys = re.findall(r"<Key>(.*?)</Key>", request.body.decode())
            failed = "".join(f"<Error><Key>{k}</Key><Code>AccessDenied</Code></Error>" for k in keys if part in k)
            gone = [k for k in keys if part not in k and request.held.pop(k, None) is not None]
            deleted = "".join(f"<Deleted><Key>{k}</Key></Deleted>" for k in gone)
            return 200, f"<DeleteResult>{deleted}{failed}</DeleteResult>".encode()
        return None

    return quirk


def test_a_checkpoint_that_is_deleted_in_part_is_none_and_goes_at_the_next_pass(store: type[Store]) -> None:
    for step in (1, 2, 3):
        url = checkpoint.checkpoint_url(RUN, step)
        for name in ("a", "b"):
            objects.write_bytes(f"{url}/{name}.safetensors", b"x")
        checkpoint.write_commit(url, step=step, kinds=["weights"], files=[], facts=FACTS)
    store.quirk = keeping("step_00000001/a")
    policy = retention.Policy(last=1)
    with pytest.raises(UserError, match=r"1 of 2 .* 1 of 2 objects under .*step_00000001 could not be deleted"):
        retention.retain(RUN, policy)
    assert [u.rpartition("/")[2] for u in checkpoint.committed(RUN)] == ["step_00000003"]
    assert [key for key in store.held if "00003" not in key] == ["run/checkpoints/step_00000001/a.safetensors"]
    store.quirk = lambda *_: None
    retention.retain(RUN, policy)
    assert all("00003" in key for key in store.held)


WHEN_REQUIRED = "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (error(501, "NotImplemented"), WHEN_REQUIRED),
        (error(400, "InvalidArgument", "Unsupported header x-amz-sdk-checksum-algorithm"), WHEN_REQUIRED),
        (error(400, "MissingContentMD5"), "AWS_REQUEST_CHECKSUM_CALCULATION=when_supported"),
        (error(403, "QuotaExceeded"), "raise the quota"),
        (error(507, "XMinioStorageFull"), "raise the quota"),
        (error(403, "RequestTimeTooSkewed"), "clock of this machine is 30 min ahead of the store's"),
        (error(403, "AccessDenied"), "check the credentials"),
        (error(400, "ExpiredToken"), "have expired"),
        (error(400, "AuthorizationHeaderMalformed"), "AWS_DEFAULT_REGION"),
    ],
)
@pytest.mark.parametrize("operations", [("PUT",), ("HEAD", "GET")], ids=["write", "look"])
def test_a_refusal_is_one_sentence_with_what_helps(
    operations: tuple[str, ...], answer: tuple[int, bytes], remedy: str, store: type[Store]
) -> None:
    def refusing(request: Store, operation: str, _: str) -> tuple[int, bytes] | None:
        if b"Skewed" in answer[1]:
            request.date = formatdate(time.time() - 1800, usegmt=True)  # type: ignore[attr-defined]
        return answer if operation in operations else None

    store.quirk = refusing
    with pytest.raises(UserError, match=re.escape(remedy)) as raised:
        objects.write_bytes("s3://bucket/x", b"1") if operations == ("PUT",) else objects.exists("s3://bucket/x")
    text = str(raised.value)
    assert "s3://bucket/x" in text and "\n" not in text and len(text) < 400


def test_a_refusal_of_a_ranged_read_is_the_same_sentence(store: type[Store]) -> None:
    store.quirk = lambda _, operation, __: error(403, "RequestTimeTooSkewed") if operation == "GET" else None
    with pytest.raises(UserError, match="clock"):
        range_reads.read_into("s3://bucket/x", 0, memoryview(bytearray(4)), range_reads.ObjectVersion(4, '"tag"'))


@pytest.mark.parametrize(("status", "code"), [(429, "TooManyRequests"), (503, "SlowDown"), (500, "InternalError")])
def test_an_answer_that_may_pass_is_asked_for_again(status: int, code: str, store: type[Store]) -> None:
    left = [2]

    def busy(_: Store, operation: str, __: str) -> tuple[int, bytes] | None:
        left[0] -= operation == "PUT"
        return error(status, code) if operation == "PUT" and left[0] >= 0 else None

    store.quirk = busy
    objects.write_bytes("s3://bucket/x", b"1")
    assert store.held == {"x": b"1"}


def test_a_checksum_that_does_not_fit_is_asked_for_again_and_then_names_the_setting() -> None:
    mismatch = type("FlexibleChecksumError", (Exception,), {})()
    assert store_errors.is_transient(mismatch)
    with pytest.raises(UserError, match="AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"):
        clients.give_up(mismatch, "s3://bucket/x")


def test_a_home_that_nobody_has_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"no home folder for ~nobody_of_that_name; write the whole path"):
        objects.local_path("~nobody_of_that_name/x")
    assert objects.local_path("~/x") == Path.home() / "x"
