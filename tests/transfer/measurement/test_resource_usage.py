"""Watts from counters that say what we know, and memory of this process."""

import sys
import time
from pathlib import Path

import pytest

from tests.pipeline import fake_nvml
from transfer.measurement.resource_usage import Memory, Power


def package(folder: Path, name: str, microjoules: int) -> Path:
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text("1000000000\n")
    return place


def test_processors_are_what_the_counters_of_whole_packages_rose_by(tmp_path: Path) -> None:
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl"):
        package(tmp_path, name, 999_000_000)
    power, begin_s = Power(tmp_path, gpu=""), time.monotonic()
    package(tmp_path, "intel-rapl:0", 999_500_000)  # 0.5 J
    package(tmp_path, "intel-rapl:1", 500_000)  # over the end of its range: 1.5 J
    package(tmp_path, "intel-rapl:0:0", 999_900_000)  # cores, a part of the first
    time.sleep(0.3)
    watts = power.watts()
    assert set(watts) == {"cpu"} and watts["cpu"] == pytest.approx(2.0 / (time.monotonic() - begin_s), rel=0.2)


def test_what_cannot_be_read_is_not_measured(tmp_path: Path) -> None:
    assert Power(tmp_path / "none", gpu="").watts() == {}
    package(tmp_path, "intel-rapl:0", 5)
    power = Power(tmp_path, gpu="")
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert power.watts() == {}


def test_a_gpu_is_what_its_counter_rose_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used_mj = fake_nvml.install(monkeypatch)
    power, begin_s = Power(tmp_path / "none", gpu="GPU-bb22"), time.monotonic()
    used_mj[0] += 60_000
    time.sleep(0.3)
    assert power.watts() == {"gpu": pytest.approx(60 / (time.monotonic() - begin_s), rel=0.2)}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_trial_is_not_charged_with_what_others_have_freed() -> None:
    """A worker that had run a deep network kept 4.6 GB for trials of 1.4, until the machine had none left."""
    blocks = [bytes(64_000) for _ in range(4_000)]
    pin = bytes(64_000)  # above them in the heap, so that their memory stays when they go
    before = Memory().max_bytes()
    del blocks
    assert Memory().max_bytes() < before - 150e6 and pin
