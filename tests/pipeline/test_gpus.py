"""Which GPUs are read, in which units, and that nothing is said where none answers."""

import pynvml
import pytest

from pipeline import gpus
from tests.pipeline import fake_nvml


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, [0, 1, 2, 3]), ("", []), ("3,0", [3, 0]), ("GPU-bb2", [1]), ("2,-1,0", [2]), ("7", [])],
)
def test_only_the_devices_of_this_job_are_read(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[int]
) -> None:
    fake_nvml.install(monkeypatch)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpus.readings()
    assert [found.get(f"gpu{i}_utilisation_percent") for i in range(len(expected))] == [80 + gpu for gpu in expected]
    assert f"gpu{len(expected)}_utilisation_percent" not in found


def test_readings_have_the_units_of_their_names_and_what_is_not_told_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_nvml.install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    zero = {"utilisation_percent": 80, "memory_used_mib": 3072, "memory_total_mib": 81920, "temperature_c": 61}
    expected = {f"gpu0_{k}": v for k, v in (zero | {"power_w": 250.5}).items()}
    assert gpus.readings() == expected | {f"gpu1_{k}": v for k, v in (zero | {"utilisation_percent": 81}).items()}


def test_where_no_driver_answers_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)

    monkeypatch.setattr(pynvml, "nvmlInit", fails)
    assert gpus.readings() == {} and gpus.energy_joules("GPU-aa11") is None
