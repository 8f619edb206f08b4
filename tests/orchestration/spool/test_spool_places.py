"""Spools on a machine that is shared, and from a store that others write to."""

import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestration.figures.run_figures import Pictures
from orchestration.spool import mirror, process_lock, system_metrics
from orchestration.spool.mirror import pull
from orchestration.spool.spool import Spool, is_spool, records_folder
from orchestration.tracking import uploader
from orchestration.tracking.mlflow_client import send_file
from pipeline.errors import UserError
from pipeline.storage import objects

URL = "memory://bucket/runs/a"
LINE = b'{"attempt": 1, "kind": "Attempt"}\n'


def test_only_spools_come_out_of_a_store(tmp_path: Path) -> None:
    span = f"{0:015}-{len(LINE):015}"
    names = (
        "records.jsonl",
        "system-node_1.jsonl",
        "mlflow.py",
        "psutil.py",
        "run.yaml",
        "system-a.jsonl.py",
        ".bashrc",
    )
    for name in names:
        objects.write_bytes(f"{URL}/spool/{name}/{span}", LINE)
    objects.write_bytes(f"{URL}/spool/records.jsonl/{len(LINE):015}-9", LINE)
    assert pull(URL, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(names[:2], LINE)
    assert not any(
        is_spool(name) for name in ("system-../x.jsonl", "system-a/b.jsonl", "records.jsonl\n", "tracking.json")
    )


def test_no_more_of_a_store_s_spool_is_read_than_its_names_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "memory://bucket/runs/large"
    part = f"{url}/spool/records.jsonl/{0:015}-{len(LINE):015}"
    for held in (LINE * 2, LINE[:-1]):
        objects.write_bytes(part, held)
        with pytest.raises(UserError, match=rf"records\.jsonl.* is not the {len(LINE)} bytes that its name says"):
            pull(url, tmp_path)
    objects.write_bytes(part, LINE)
    monkeypatch.setattr(mirror, "MAX_BYTES", len(LINE) - 1)
    with pytest.raises(UserError, match=rf"records\.jsonl holds {len(LINE)} bytes, more than the .*; move it away"):
        pull(url, tmp_path)
    assert not list(tmp_path.iterdir())


def test_records_of_a_store_lie_where_nobody_else_can_look_or_be_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    folder = records_folder(URL)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (folder, folder.parent, tmp_path / "cache")} == {0o700}
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="must be a folder of yours"):
        records_folder(URL)


@pytest.mark.parametrize("writer", ["lock", "spool", "log", "figures"])
def test_nothing_is_written_through_a_link(tmp_path: Path, writer: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    name = {"lock": "tracking.lock", "spool": "records.jsonl"}.get(writer, "tracking.log")
    (tmp_path / name).symlink_to(precious)
    if writer == "log":
        uploader.Uploader(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")._log("text")  # a log is no reason to fail
    else:
        with pytest.raises(UserError, match="is a link"):
            if writer == "lock":
                with process_lock.only_one(tmp_path / name, lambda: False, wait_s=0.0):
                    pass
            elif writer == "spool":
                Spool(tmp_path / name)
            else:
                Pictures(tmp_path)._draw("training")
    assert precious.read_text() == "precious"


def test_an_import_sends_no_file_from_outside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sent, tags = tmp_path / "run", list[str](), dict[str, str]()
    run.mkdir()
    (tmp_path / "key").write_text("-----BEGIN PRIVATE KEY")
    (run / "run.yaml").symlink_to(tmp_path / "key")
    (run / "pictures").symlink_to(tmp_path)
    monkeypatch.setattr(uploader, "send", lambda client, run_id, upload: tags.update(upload.tags))
    work = uploader.Uploader(run, f"sqlite:///{tmp_path}/mlflow.db")
    work._client = SimpleNamespace(log_artifact=lambda run_id, file, folder: sent.append(file))
    work._state = {"run_id": "1"}
    work._send_config({"name": "r"})
    work._send_artifacts([run / "pictures" / "key"])
    assert not sent and "run.yaml" in capsys.readouterr().err and "artifact_error" in tags
    (run / "run.yaml").unlink()
    work._send_config({"name": "r"})
    assert sent == [str(run / "run.json")]


def test_a_report_behind_a_link_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "scorecard.html").write_text("private")
    (tmp_path / "sweep" / "report").symlink_to(tmp_path / "elsewhere")
    client = SimpleNamespace(log_artifact=lambda *_: pytest.fail("sent"))
    with pytest.raises(UserError, match="is it a link"):
        send_file(client, "1", tmp_path / "sweep", tmp_path / "sweep" / "report" / "scorecard.html")


def test_the_sampler_of_another_machine_copies_its_spool_into_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def start(module: str, arguments: list[str], **_: Any) -> None:
        started.append(arguments)

    monkeypatch.setattr(system_metrics.child_process, "start", start)
    system_metrics.start_sampler("run", URL)
    system_metrics.start_sampler("run")
    assert started[0][-2:] == ["--mirror", URL] and "--mirror" not in started[1]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_reads_and_writes_nothing_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(parent.stat().st_mode | 0o055)
    folder = records_folder(URL)
    with Spool(folder / "records.jsonl"):
        pass
    code = (
        "import os, sys\nos.setgid(65534); os.setuid(65534)\n"
        "for act in (os.listdir, lambda f: open(f + '/records.jsonl'), lambda f: open(f + '/x', 'w')):\n"
        "    try: act(sys.argv[1])\n"
        "    except PermissionError: continue\n"
        "    sys.exit('reached')\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(folder)], check=True, cwd="/")
