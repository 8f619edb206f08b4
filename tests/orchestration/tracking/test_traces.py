"""A profile's record in MLflow's terms, and which files it may name."""

from pathlib import Path

import pytest

from orchestration.spool.mirror import Mirror, traces
from orchestration.tracking.translate import Translator

RECORD = {
    "kind": "Profiled",
    "step": 4,
    "time_s": 1.0,
    "first": 3,
    "last": 4,
    "step_ms": 12.5,
    "phases": [{"name": "forward", "host_share": 0.25}, {"name": "backward", "host_share": 0.5}],
}


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("s3://bucket/run/profiles/steps-3-4.json.gz", ["steps-3-4.json.gz"]),
        ("", []),
        ("/etc/passwd", []),
        ("profiles/../steps-3-4.json.gz\n", []),
    ],
)
def test_a_profile_is_a_tag_and_a_file_of_the_runs_own_folder(url: str, names: list[str]) -> None:
    upload = Translator().translate({**RECORD, "url": url})
    assert upload.traces == names
    assert upload.tags == {"profile.last": "steps 3 to 4, 12.5 ms each: forward 25.0%, backward 50.0%"}


def test_a_trace_is_brought_from_the_store(tmp_path: Path) -> None:
    (tmp_path / "store" / "profiles").mkdir(parents=True)
    (tmp_path / "store" / "profiles" / "steps-3-4.json.gz").write_bytes(b"trace")
    (tmp_path / "run").mkdir()
    mirror = Mirror(tmp_path / "run", str(tmp_path / "store"), own=())
    there, missing = traces(tmp_path / "run", mirror, ["steps-3-4.json.gz", "steps-5-5.json.gz"])
    assert there.read_bytes() == b"trace" and not missing.exists()
