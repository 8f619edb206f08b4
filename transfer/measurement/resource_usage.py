"""Memory and watts of a trial, where the machine tells them. Watts: RAPL's counters for processors, NVML's for GPUs.

Both speak of the whole device and not of a process: trials that share one are each told all of it. Nothing is estimated; what
cannot be read (RAPL is root's on most machines) is not measured.
"""

import contextlib
import ctypes
import gc
import time
from pathlib import Path

from pipeline import gpus

POWERCAP = Path("/sys/class/powercap")


class Power:
    """Measures from its making to `watts`."""

    def __init__(self, powercap: Path = POWERCAP, gpu: str | None = None) -> None:
        """`gpu`: its UUID, "" for none; None = the one that this process would compute on, if any."""
        self._begin_s = time.monotonic()
        self._packages = {folder: joules for folder in _packages(powercap) if (joules := _joules(folder)) is not None}
        self._gpu = _own_gpu() if gpu is None else gpu
        self._gpu_joules = gpus.energy_joules(self._gpu) if self._gpu else None

    def watts(self) -> dict[str, float]:
        """Mean power by part, "cpu" and "gpu"; parts that cannot be read are skipped."""
        seconds_s = time.monotonic() - self._begin_s
        if seconds_s <= 0:
            return {}
        found: dict[str, float] = {}
        spent = [_spent(folder, begin) for folder, begin in self._packages.items()]
        if spent and None not in spent:
            found["cpu"] = sum(s for s in spent if s is not None) / seconds_s
        if self._gpu_joules is not None and (end := gpus.energy_joules(self._gpu)) is not None:
            found["gpu"] = (end - self._gpu_joules) / seconds_s
        return found


def _packages(powercap: Path) -> list[Path]:
    """One folder a processor; what lies deeper (cores, memory) is part of it."""
    return sorted(p for p in powercap.glob("intel-rapl:*") if p.name.count(":") == 1)


def _joules(folder: Path, file: str = "energy_uj") -> float | None:
    try:
        return int((folder / file).read_text()) / 1e6
    except (OSError, ValueError):
        return None


def _spent(folder: Path, begin: float) -> float | None:
    end = _joules(folder)
    if end is None:
        return None
    if end < begin:  # the counter starts again at its range
        whole = _joules(folder, "max_energy_range_uj")
        return None if whole is None else end + whole - begin
    return end - begin


def _own_gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return ""
    uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", ""))
    return f"GPU-{uuid}" if uuid else ""


def _give_back() -> None:
    """To the system what was freed: glibc keeps it, in arenas that grew by gigabytes over the trials of a deep network."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """The most that was in use between its making and `max_bytes`: of the GPU where there is one, else of this process.

    What earlier trials of this process have left is given back first, and the mark set to what is held then (Linux).
    """

    def __init__(self) -> None:
        import torch

        _give_back()
        self._gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def max_bytes(self) -> int:
        import torch

        if torch.cuda.is_available() and torch.cuda.is_initialized():
            return int(torch.cuda.max_memory_allocated())
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
        return 0
