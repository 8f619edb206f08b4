"""An object store on the loopback that can be told to be slow or to fail: as much of S3 as a run uses, one bucket.

Objects are files below a folder, so what a run has written can be looked at without asking the store. Only requests that
carry this store's random key are answered: other users of the machine reach its port too.
"""

import hashlib
import re
import secrets
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from pipeline import places
from pipeline.errors import UserError

BUCKET = "drill"
POLL_S = 0.05
PIECE_BYTES = 1 << 18


class Store:
    """Runs from `with` on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / BUCKET).mkdir(parents=True)
        self.delay_s = 0.0
        """Before each answer."""
        self.bytes_per_s = 0.0
        """Of each request's body; 0 = as fast as it comes."""
        self.is_failing = False
        """Every request is answered with an internal error."""
        self.key = secrets.token_hex(16)
        self.lock = threading.Lock()
        self.etags: dict[str, str] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        store = self

        class Handler(_Handler):
            def __init__(self, *arguments: Any) -> None:
                self.store = store
                super().__init__(*arguments)

        self._server = _Server(("127.0.0.1", 0), Handler)

    def __enter__(self) -> "Store":
        threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="store", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a client of S3 finds it."""
        address = f"http://127.0.0.1:{self._server.server_address[1]}"
        return {
            "AWS_ENDPOINT_URL": address,
            "AWS_ENDPOINT_URL_S3": address,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.key,
            "AWS_SESSION_TOKEN": "",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def path(self, key: str) -> Path:
        """UserError for a key that is no path below the bucket."""
        return places.below(self.folder / BUCKET, key, "a request")

    def put(self, key: str, data: bytes) -> str:
        """Its ETag. The lock is the caller's."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.folder / f"new-{secrets.token_hex(4)}"
        new.write_bytes(data)
        new.replace(path)
        self.etags[key] = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
        return self.etags[key]

    def remove(self, key: str) -> None:
        if self.etags.pop(key, None):
            self.path(key).unlink()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that was killed, or gave up."""


class _Refused(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        body = self._body()
        time.sleep(self.store.delay_s)
        try:
            if f"Credential={self.store.key}/" not in self.headers.get("Authorization", ""):
                raise _Refused(403, "AccessDenied")
            if self.store.is_failing:
                raise _Refused(500, "InternalError")
            if bucket != BUCKET:
                raise _Refused(404, "NoSuchBucket")
            action = f"_{self.command.lower()}_{'object' if key else 'bucket'}"
            getattr(self, action, self._unknown)(key, query, body)
        except _Refused as refused:
            text = f"<Error><Code>{refused.code}</Code><Message>{refused.code}</Message></Error>"
            self._send(refused.status, text.encode())
        except UserError:
            self._send(400, b"<Error><Code>InvalidURI</Code></Error>")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _body(self) -> bytes:
        """At the store's speed; what S3's clients sign piece by piece is put together."""
        length, data = int(self.headers.get("Content-Length", 0)), bytearray()
        while len(data) < length and (piece := self.rfile.read(min(PIECE_BYTES, length - len(data)))):
            data += piece
            if self.store.bytes_per_s:
                time.sleep(len(piece) / self.store.bytes_per_s)
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return bytes(data)
        found, at = bytearray(), 0
        while match := re.compile(rb"([0-9a-fA-F]+)(;[^\r]*)?\r\n").match(data, at):
            size = int(match[1], 16)
            if not size:
                break
            found += data[match.end() : match.end() + size]
            at = match.end() + size + 2
        return bytes(found)

    def _send(self, status: int, body: bytes = b"", size: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _unknown(self, *_: object) -> None:
        raise _Refused(501, "NotImplemented")

    # --- the bucket ---------------------------------------------------------------------------------------------------

    def _head_bucket(self, *_: object) -> None:
        self._send(200)

    def _get_bucket(self, _key: str, query: dict[str, str], _body: bytes) -> None:
        """ListObjectsV2, all of it in one answer."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        with self.store.lock:
            found = sorted((k, e) for k, e in self.store.etags.items() if k.startswith(prefix))
            sizes = {k: self.store.path(k).stat() for k, _ in found}
        rows, folders = [], []
        for key, etag in found:
            rest, is_folder, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if is_folder:
                folders.append(prefix + rest + delimiter)
                continue
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(sizes[key].st_mtime))
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified><ETag>{escape(etag)}</ETag>"
                f"<Size>{sizes[key].st_size}</Size></Contents>"
            )
        rows += [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in dict.fromkeys(folders)]
        text = (
            f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>"
        )
        self._send(200, text.encode(), Content_Type="application/xml")

    def _post_bucket(self, _key: str, query: dict[str, str], body: bytes) -> None:
        """DeleteObjects."""
        if "delete" not in query:
            self._unknown()
        keys = [unescape(key) for key in re.findall(r"<Key>(.*?)</Key>", body.decode())]
        with self.store.lock:
            for key in keys:
                self.store.remove(key)
        gone = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self._send(200, f"<DeleteResult>{gone}</DeleteResult>".encode(), Content_Type="application/xml")

    # --- an object ----------------------------------------------------------------------------------------------------

    def _head_object(self, key: str, query: dict[str, str], body: bytes) -> None:
        self._get_object(key, query, body)

    def _get_object(self, key: str, _query: dict[str, str], _body: bytes) -> None:
        with self.store.lock:
            if key not in self.store.etags:
                raise _Refused(404, "NoSuchKey")
            path, etag = self.store.path(key), self.store.etags[key]
            data = path.read_bytes() if self.command == "GET" else b""
            size, modified = path.stat().st_size, self.date_time_string(path.stat().st_mtime)
        facts = {"ETag": etag, "Last_Modified": modified, "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return self._send(200, data, size, **facts)
        first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first > last:
            raise _Refused(416, "InvalidRange")
        facts["Content_Range"] = f"bytes {first}-{last}/{size}"
        self._send(206, data[first : last + 1], last + 1 - first, **facts)

    def _put_object(self, key: str, query: dict[str, str], body: bytes) -> None:
        with self.store.lock:
            if "uploadId" in query:
                self._upload(query)[int(query["partNumber"])] = body
                return self._send(200, ETag=f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"')
            there = self.store.etags.get(key)
            if (self.headers.get("If-None-Match") == "*" and there) or self.headers.get("If-Match", there) != there:
                raise _Refused(412, "PreconditionFailed")
            self._send(200, ETag=self.store.put(key, body))

    def _upload(self, query: dict[str, str]) -> dict[int, bytes]:
        if query["uploadId"] not in self.store.uploads:
            raise _Refused(404, "NoSuchUpload")
        return self.store.uploads[query["uploadId"]]

    def _post_object(self, key: str, query: dict[str, str], _body: bytes) -> None:
        """CreateMultipartUpload and CompleteMultipartUpload."""
        with self.store.lock:
            if "uploads" in query:
                number = secrets.token_hex(8)
                self.store.uploads[number] = {}
                text = f"<UploadId>{number}</UploadId>"
                name = "InitiateMultipartUploadResult"
            else:
                parts = self._upload(query)
                etag = self.store.put(key, b"".join(parts[number] for number in sorted(parts)))
                del self.store.uploads[query["uploadId"]]
                text, name = f"<ETag>{escape(etag)}</ETag>", "CompleteMultipartUploadResult"
        text = f"<{name}><Bucket>{BUCKET}</Bucket><Key>{escape(key)}</Key>{text}</{name}>"
        self._send(200, text.encode(), Content_Type="application/xml")

    def _delete_object(self, key: str, query: dict[str, str], _body: bytes) -> None:
        with self.store.lock:
            if "uploadId" in query:
                self.store.uploads.pop(query["uploadId"], None)
            else:
                self.store.remove(key)
        self._send(204)
