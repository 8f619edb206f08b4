"""Names from outside become paths below their root or a sentence; private folders are private."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline import places
from pipeline.errors import UserError

BAD = [
    "",
    ".",
    "..",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\nb",
    "a\x1b[2Jb",
    "~",
    "~root",
    "con",
    "NUL.txt",
    "x" * 256,
    "\udc80",
]


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_name_that_is_no_entry_of_a_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="the manifest holds the name"):
        places.entry_name(name, "the manifest")


@pytest.mark.parametrize("name", ["a", "a.tar", ".hidden", "..a", "naïve", "train-000001.tar", "aux_files", "-x"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert places.entry_name(name, "x") == name


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "a/", "link/x", "file"])
def test_nothing_below_a_root_leads_out_of_it(tmp_path: Path, name: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    (root / "a").mkdir(parents=True)
    (outside / "x").write_text("precious")
    (root / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "x")
    with pytest.raises(UserError):
        places.below(root, name, "the list")
    for flags in (os.O_RDONLY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC):
        with pytest.raises(UserError):
            places.open_below(root, name, flags, "the list")
    assert (outside / "x").read_text() == "precious"


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match="is not a file"):
            places.open_below(tmp_path, name, os.O_RDONLY, "the run")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"content")
    with os.fdopen(places.open_below(tmp_path, "deep/file", os.O_RDONLY, "the run"), "rb") as file:
        assert file.read() == b"content"


def test_urls_have_names_of_their_own_that_are_entries() -> None:
    urls = [
        "s3://b/runs/a",
        "s3://b/runs-a",
        "s3://b-runs/a",
        "s3://b/" + "x" * 900,
        "s3://b/ü\n",
        "../..",
        "memory://",
    ]
    names = [places.name_of_url(url) for url in urls]
    assert len(set(names)) == len(urls) and places.name_of_url("s3://b/runs/a/") == names[0]
    assert [places.entry_name(name, "x") for name in names] == names


def test_a_private_folder_is_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "normfree"))
    (tmp_path / "normfree" / "spools").mkdir(parents=True, mode=0o777)
    (tmp_path / "normfree" / "spools").chmod(0o777)
    folder = places.private_folder("spools", "a")
    assert folder == tmp_path / "normfree" / "spools" / "a"
    assert {stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.parents[:2])} == {0o700}


@pytest.mark.parametrize("other", ["link", "file", "owner"])
def test_a_private_folder_of_somebody_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "normfree"))
    (tmp_path / "normfree").mkdir()
    if other == "link":
        (tmp_path / "normfree" / "spools").symlink_to(tmp_path)
    elif other == "file":
        (tmp_path / "normfree" / "spools").write_text("")
    elif os.getuid() == 0:
        (tmp_path / "normfree" / "spools").mkdir()
        os.chown(tmp_path / "normfree" / "spools", 65534, 65534)
    else:
        pytest.skip("only root can make another user's folder")
    with pytest.raises(UserError, match="must be a folder of yours"):
        places.private_folder("spools")


@pytest.mark.parametrize("kind", ["absent", "foreign", "file"])
def test_a_home_that_is_not_ours_is_replaced_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    home = tmp_path / "home"
    if kind == "file":
        home.write_text("")
        cache = home / ".cache"
    else:
        home.mkdir()
        cache = home
    monkeypatch.setattr(places, "_candidates", lambda: iter([cache]))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("NORMFREE_CACHE", "")
    if kind in ("absent", "foreign"):
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    if kind == "absent":
        home.rmdir()
    folder = places.cache_folder()
    assert folder.name.startswith("normfree-cache-") and "set NORMFREE_CACHE" in capsys.readouterr().err
    assert places.cache_folder() == folder


HOLDER = """
import sys, time
from pipeline import places
with places.temporary_folder("test"):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_with_the_next_start_and_what_lives_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "other-folder").mkdir()
    (tmp_path / f"{places.TEMPORARY}link").symlink_to(tmp_path / "other-folder")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        places.remove_leftovers()
        (held,) = (p for p in tmp_path.glob(f"{places.TEMPORARY}*") if not p.is_symlink())
        assert held.stat().st_mode & 0o777 == 0o700
        holder.kill()
    assert held.exists()
    with places.temporary_folder("test") as ours:
        assert not held.exists() and ours.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{places.TEMPORARY}link", "other-folder"]
