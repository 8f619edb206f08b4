"""A stand-in for the Hugging Face Hub: what its client asks of it for repositories, commits and files, kept in memory."""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stand_in_0123456789"


@dataclass
class Hub:
    url: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """ORG/NAME -> commit -> path -> content."""
    private: set[str] = field(default_factory=set)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    writers: tuple[str, ...] = ("org",)
    asked: list[str] = field(default_factory=list)

    def commit_of(self, repository: str, revision: str) -> str | None:
        known = self.branches.get((repository, revision), revision)
        return known if known in self.repositories.get(repository, {}) else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._send({"error": code}, 404, X_Error_Code=code)

    def _begin(self) -> list[str]:
        self.hub.asked.append(f"{self.command} {self.path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.may = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        return [urllib.parse.unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]

    def do_POST(self) -> None:
        match self._begin():
            case ["api", "repos", "create"]:
                asked = json.loads(self.body)
                if not self.may or asked["organization"] not in self.hub.writers:
                    return self._send({"error": "no"}, 403 if self.may else 401)
                name = f"{asked['organization']}/{asked['name']}"
                self.hub.repositories.setdefault(name, {})
                if asked.get("private") or asked.get("visibility") == "private":
                    self.hub.private.add(name)
                return self._send({"url": f"{self.hub.url}/{name}", "name": name})
            case ["api", "validate-yaml"]:
                return self._send({"errors": [], "warnings": []})
            case ["api", "models", _, _, "preupload", _]:
                files = json.loads(self.body)["files"]
                modes = [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in files
                ]  # fmt: skip
                return self._send({"files": modes})
            case [*_, "objects", "batch"]:
                wanted = json.loads(self.body)["objects"]
                found = [{**o, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}} for o in wanted]
                return self._send({"transfer": "basic", "objects": found})
            case ["api", "models", org, name, "commit", branch] if self.may:
                return self._commit(f"{org}/{name}", branch)
        self._send({"error": "no"}, 404 if self.may else 401)

    def _commit(self, repository: str, branch: str) -> None:
        head = self.hub.commit_of(repository, branch)
        files = dict(self.hub.repositories[repository].get(head or "", {}))
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        commit = hashlib.sha1(self.body).hexdigest()
        self.hub.repositories[repository][commit] = files
        self.hub.branches[repository, branch] = commit
        self._send({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit, "success": True})

    def do_PUT(self) -> None:
        (_, digest) = self._begin()
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.hub.large[digest] = self.body
        self._send({})

    def do_GET(self) -> None:
        match self._begin():
            case ["api", "models", org, name, *rest]:
                self._facts(f"{org}/{name}", rest)
            case [org, name, "resolve", revision, *path]:
                self._file(f"{org}/{name}", revision, "/".join(path))
            case _:
                self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _facts(self, repository: str, rest: list[str]) -> None:
        if repository not in self.hub.repositories or (repository in self.hub.private and not self.may):
            return self._missing("RepoNotFound")
        commit = self.hub.commit_of(repository, rest[1] if rest else "main")
        if commit is None:
            return self._missing("RevisionNotFound")
        if rest[:1] == ["tree"]:
            files = self.hub.repositories[repository][commit]
            return self._send(
                [
                    {"type": "file", "path": p, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for p, d in files.items()
                ]
            )
        self._send(
            {"id": repository, "sha": commit, "siblings": [], "tags": [], "private": False, "downloads": 0, "likes": 0}
        )

    def _file(self, repository: str, revision: str, path: str) -> None:
        if repository in self.hub.private and not self.may:
            return self._missing("RepoNotFound")
        commit = self.hub.commit_of(repository, revision)
        data = self.hub.repositories.get(repository, {}).get(commit or "", {}).get(path)
        if data is None:
            return self._missing("EntryNotFound")
        etag = hashlib.sha256(data).hexdigest()
        self._send(data, ETag=f'"{etag}"', X_Repo_Commit=commit or "")


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
