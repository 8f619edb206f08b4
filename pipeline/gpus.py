"""What NVIDIA's management library tells of this host's GPUs: one door for doctor, system metrics and the energy of trials.

Nothing is estimated: what a device does not tell is missing.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def management_library() -> Iterator[Any]:
    """`pynvml`, opened. Raises its NVMLError where there is no driver, or it does not answer."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def readings() -> dict[str, float]:
    """`gpu<i>_<reading>`, i counted among the devices of this job; {} where no driver answers."""
    import pynvml

    found: dict[str, float] = {}
    with contextlib.suppress(pynvml.NVMLError), management_library() as nvml:
        for number, handle in enumerate(_visible(nvml)):
            for part in (_utilisation, _memory, _power, _temperature):
                with contextlib.suppress(nvml.NVMLError):  # not every device tells everything
                    found |= {f"gpu{number}_{name}": float(value) for name, value in part(nvml, handle).items()}
    return found


def energy_joules(uuid: str) -> float | None:
    """What a GPU has used since its driver was loaded; None where that is not counted (before Volta, a part of a GPU)."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError), management_library() as nvml:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByUUID(uuid))) / 1000
    return None


def _visible(nvml: Any) -> list[Any]:
    """CUDA_VISIBLE_DEVICES holds indices or UUIDs (also beginnings of them), and ends at the first that is neither."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return handles
    mine = list[Any]()
    for word in (word.strip() for word in given.split(",")):
        if word.isdecimal() and int(word) < len(handles):
            mine.append(handles[int(word)])
        elif word.startswith("MIG-"):
            mine.append(nvml.nvmlDeviceGetHandleByUUID(word))
        elif re.fullmatch(r"GPU-[0-9A-Fa-f-]+", word):
            mine += [handle for handle in handles if nvml.nvmlDeviceGetUUID(handle).startswith(word)]
        else:
            break
    return mine


def _utilisation(nvml: Any, handle: Any) -> dict[str, float]:
    return {"utilisation_percent": nvml.nvmlDeviceGetUtilizationRates(handle).gpu}


def _memory(nvml: Any, handle: Any) -> dict[str, float]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {"memory_used_mib": memory.used / 2**20, "memory_total_mib": memory.total / 2**20}


def _power(nvml: Any, handle: Any) -> dict[str, float]:
    return {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000}


def _temperature(nvml: Any, handle: Any) -> dict[str, float]:
    return {"temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)}
