"""Numbers that a plan rests on and nobody has measured on the machines in question: value, unit, source; each can be set."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipeline.configuration import convert, nearest
from pipeline.errors import UserError
from pipeline.field_types import NonNegative, Positive
from pipeline.planning.devices import Device


@dataclass(frozen=True, kw_only=True)
class Assumption:
    value: float
    unit: str
    source: str


MAY_BE_ZERO = ("overlap", "fragmentation", "failures_per_device_day", "restart_s", "context_gb", "workspace_gb")


def assumptions(device: Device) -> dict[str, Assumption]:
    """By the name that sets it."""
    cuda = not device.is_cpu
    table = f"device table, {device.url}"
    libraries = "CUDA context and libraries" if cuda else "Python, torch and DeepSpeed, measured"
    scratch = "cuDNN, cuBLAS and NCCL buffers" if cuda else "oneDNN, measured"
    rows: list[tuple[str, float, str, str]] = [
        ("compute_share", device.share, "of the device's rate", device.share_source),
        ("device_memory_gb", device.memory_gb, "GB", table),
        ("memory_gb_per_s", device.memory_gb_per_s, "GB/s", table),
        ("link_gb_per_s", device.link_gb_per_s, "GB/s, a device in its node", table),
        ("link_share", 0.75, "of the rate of links and network", "an assumption; nccl-tests tells yours"),
        ("node_latency_us", 3.0 if cuda else 30.0, "us a hop in a node", "an assumption; nccl-tests tells yours"),
        ("network_latency_us", 8.0 if cuda else 50.0, "us a hop between nodes", "an assumption, RDMA and a switch"),
        ("overlap", 0.0, "of communication hidden", "overlap_comm is off in stages 0 to 2; stage 3 hides some"),
        ("context_gb", 0.6 if cuda else 0.9, "GB a process", libraries),
        ("workspace_gb", 1.0 if cuda else 0.02, "GB", scratch),
        ("fragmentation", 0.05 if cuda else 0.02, "of tensors", "an assumption: what the allocator cannot use"),
        ("bytes_per_image", 110_000, "bytes", "ImageNet's training set, 138 GB of 1,281,167 images; --data tells"),
        (
            "decode_images_per_s",
            850,
            "images/s a core, 224 px",
            "README, one core of an AMD EPYC; 'normfree data bench'",
        ),
        ("cores_per_device", 12, "cores", "an assumption: 96 cores for 8 devices"),
        ("bucket_gb_per_s", 1.25, "GB/s a node", "an assumption: 10 Gbit/s; 'normfree data bench'"),
        ("disk_gb_per_s", 2.0, "GB/s a node", "an assumption: one NVMe disk"),
        ("copy_gb_per_s", 10.0, "GB/s a device", "an assumption: device to host memory, half of PCIe 4"),
        ("failures_per_device_day", 4.7e-4, "interruptions", "419 in 54 days on 16,384 H100 (arXiv 2407.21783, 3.3.4)"),
        ("restart_s", 300, "s", "an assumption: from a failure until training goes on"),
        ("watts", device.watts, "W a device", f"{table}; hosts, network and cooling not included"),
    ]
    return {name: Assumption(value=value, unit=unit, source=source) for name, value, unit, source in rows}


def replaced(known: Mapping[str, Assumption], given: Mapping[str, str], source: str) -> dict[str, Assumption]:
    """Values by name from text, as the command line gives them. UserError for a name that there is not."""
    found = dict(known)
    for name, text in given.items():
        if name not in found:
            raise UserError(f"--assume has no {name!r}; {nearest(name, found)}")
        value = convert(NonNegative if name in MAY_BE_ZERO else Positive, text, f"--assume {name}")
        if name in ("compute_share", "link_share", "overlap") and value > 1:
            raise UserError(f"--assume {name} is {text}; set a share of at most 1")
        found[name] = replace(found[name], value=float(value), source=source)
    return found
