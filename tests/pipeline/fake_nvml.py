"""NVIDIA's management library with four GPUs: numbers that a test knows, in the library's own units."""

from types import SimpleNamespace

import pynvml
import pytest

UUIDS = ["GPU-aa11", "GPU-bb22", "GPU-bb33", "GPU-cc44"]


def install(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Its handles are numbers; number 1 does not tell its power. Returns a list whose only value is the millijoules used."""
    used_mj = [1_000_000]

    def power(gpu: int) -> int:
        if gpu == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return 250_500

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: len(UUIDS),
        "nvmlDeviceGetHandleByIndex": lambda number: number,
        "nvmlDeviceGetHandleByUUID": lambda uuid: UUIDS.index(uuid),
        "nvmlDeviceGetUUID": lambda gpu: UUIDS[gpu],
        "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(gpu=80 + gpu, memory=5),
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=3 << 30, total=80 << 30, free=77 << 30),
        "nvmlDeviceGetPowerUsage": power,
        "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
        "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: used_mj[0],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    return used_mj
