"""Watts from counters and a program that say what we know."""

import os
import time
from pathlib import Path

import pytest

from transfer.measurement.resource_usage import Power


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


def test_a_gpu_is_the_mean_of_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    lines = r"100.5\n[N/A]\n301.5\n"
    program.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/new\nprintf "{lines}"\nmv {tmp_path}/new {tmp_path}/words\nexec sleep 60\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    power = Power(tmp_path / "none", gpu="GPU-7")
    while not (tmp_path / "words").exists():
        time.sleep(0.01)
    assert power.watts() == {"gpu": 201.0} and "-i GPU-7" in (tmp_path / "words").read_text()
    assert power.watts() == {}  # asked once
