"""The devices of a host: GPUs as NVIDIA's management library tells of them, or the CPU that computes in their place."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from orchestration.child_process import cores
from orchestration.doctor.messages import Examined, Finding
from pipeline import gpus

DRIVER = Path("/proc/driver/nvidia/version")
IN_USE_BYTES = 1 << 30
"""Of a GPU's memory, by others, before anything of ours runs there."""
SLOWED = {
    "nvmlClocksEventReasonHwSlowdown": "the hardware slows it down (heat or power)",
    "nvmlClocksEventReasonSwThermalSlowdown": "its driver slows it down for heat",
    "nvmlClocksEventReasonHwThermalSlowdown": "the hardware slows it down for heat",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "its power supply slows it down",
}
"""Reasons for lower clocks that mean a fault; a power cap under load does not."""


def examine() -> Examined:
    """GPUs of this host, or its CPU."""
    import torch

    from nfnet.kernels import cpu
    from pipeline import distributed

    facts, findings = {"devices": distributed.devices(0)}, list[Finding]()
    if torch.cuda.is_available():
        facts["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        facts["cores"] = f"{cores()}"
        if cpu.problem:
            findings.append(
                Finding(what="compiled loops", value=cpu.problem, remedy="a step takes a third longer", is_fault=False)
            )
        if DRIVER.exists():
            findings.append(
                Finding(
                    what="GPUs",
                    value="an NVIDIA driver is loaded, and torch finds no GPU",
                    remedy=f"unset CUDA_VISIBLE_DEVICES, or install a torch for this driver (it has CUDA {torch.version.cuda})",
                )
            )
    told = _nvml()
    return Examined(facts=facts | told.facts, findings=findings + told.findings)


def _nvml() -> Examined:
    """What the management library tells; nothing where there is no driver."""
    import pynvml

    try:
        with gpus.management_library() as nvml:
            return _all_gpus(nvml)
    except pynvml.NVMLError as error:
        if not DRIVER.exists():
            return Examined()
        value = f"the driver does not answer ({error})"
        return Examined(findings=[Finding(what="GPUs", value=value, remedy="restart the host")])


def _all_gpus(nvml: Any) -> Examined:
    import torch

    count, findings, links = nvml.nvmlDeviceGetCount(), list[Finding](), list[int]()
    facts = {"driver": str(nvml.nvmlSystemGetDriverVersion())}
    for number in range(count):
        handle = nvml.nvmlDeviceGetHandleByIndex(number)
        findings += [_of(number, finding) for finding in _one_gpu(nvml, handle)]
        links.append(_links(nvml, handle))
    if any(links):
        facts["NVLink"] = f"{max(links)} links a GPU"
        findings += [
            _of(
                i,
                Finding(
                    what="NVLink",
                    value=f"{n} of {max(links)} links are up",
                    remedy="restart the host, or have it mended",
                ),
            )
            for i, n in enumerate(links)
            if n < max(links)
        ]
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        value = f"torch sees {torch.cuda.device_count()} of {count}"
        findings.append(
            Finding(what="GPUs", value=value, remedy="CUDA_VISIBLE_DEVICES leaves some out", is_fault=False)
        )
    return Examined(facts=facts, findings=findings)


def _one_gpu(nvml: Any, handle: Any) -> list[Finding]:
    found = list[Finding]()
    with contextlib.suppress(nvml.NVMLError):  # not every device tells everything
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        if errors:
            value = f"{errors} uncorrected memory errors since the driver was loaded"
            found.append(
                Finding(what="ECC", value=value, remedy="reset or replace the GPU: results are not to be trusted")
            )
    with contextlib.suppress(nvml.NVMLError):
        _, _, is_pending, has_failed = nvml.nvmlDeviceGetRemappedRows(handle)
        if is_pending or has_failed:
            value = (
                "rows of its memory wait to be remapped" if is_pending else "rows of its memory could not be remapped"
            )
            found.append(Finding(what="ECC", value=value, remedy="reset the GPU" if is_pending else "replace the GPU"))
    with contextlib.suppress(nvml.NVMLError):
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        for name, text in SLOWED.items():
            if reasons & getattr(nvml, name, 0):
                found.append(Finding(what="throttling", value=text, remedy="look at its cooling and power"))
    with contextlib.suppress(nvml.NVMLError):
        used = nvml.nvmlDeviceGetMemoryInfo(handle).used
        if used > IN_USE_BYTES:
            value = f"{used / 2**30:.1f} GiB of its memory are in use"
            found.append(
                Finding(what="memory", value=value, remedy="nvidia-smi names the processes; end them", is_fault=False)
            )
    return found


def _links(nvml: Any, handle: Any) -> int:
    """NVLinks that are up."""
    num_up = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        with contextlib.suppress(nvml.NVMLError):
            num_up += nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
    return num_up


def _of(number: int, finding: Finding) -> Finding:
    return dataclasses.replace(finding, what=f"GPU {number} {finding.what}")
