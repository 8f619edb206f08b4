"""Devices that a run can be planned for: their makers' figures, and what share of them such networks reach."""

from dataclasses import dataclass

from pipeline.configuration import nearest
from pipeline.engine.deepspeed_engine import EngineConfig
from pipeline.errors import UserError

_NVIDIA = "https://www.nvidia.com/en-us/data-center"
_TABLE_3 = "Brock et al. 2021 (arXiv 2102.06171), table 3 and A.5"
_TIMM = (
    "dm_nfnet_f0 to f6 on an RTX 3090 in timm's training benchmark: 0.15 of its rate (huggingface/pytorch-image-models)"
)


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device; of a TPU one core, as the papers count them."""

    name: str
    tensor_flops: float
    """Dense bf16 operations a second, two for each multiply-add."""
    fp32_flops: float
    """The same of fp32 convolutions."""
    tf32_flops: float
    """The same with engine.tf32: in TF32 where the device has it."""
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float
    """To the other devices of its node, in one direction."""
    watts: float
    share: float
    """Of its rate that a training step of an NFNet reaches."""
    share_source: str
    url: str
    is_cpu: bool = False

    def flops(self, engine: EngineConfig) -> float:
        """Of convolutions as the engine runs them."""
        if engine.precision == "bf16":
            return self.tensor_flops
        return self.tf32_flops if engine.tf32 else self.fp32_flops


def _gpu(
    name: str, bf16: float, tf32: float, fp32: float, memory: float, rate: float, link: float, watts: float, page: str
) -> Device:
    return Device(
        name=name,
        tensor_flops=bf16 * 1e12,
        fp32_flops=fp32 * 1e12,
        tf32_flops=tf32 * 1e12,
        memory_gb=memory,
        memory_gb_per_s=rate,
        link_gb_per_s=link,
        watts=watts,
        share=0.15,
        share_source=f"{_TIMM}; not measured on this device, --measure does",
        url=f"{_NVIDIA}/{page}/",
    )


def _tpu(
    name: str, bf16: float, memory: float, rate: float, link: float, watts: float, share: float, why: str
) -> Device:
    return Device(
        name=name,
        tensor_flops=bf16 * 1e12,
        fp32_flops=bf16 * 1e12 / 3,
        tf32_flops=bf16 * 1e12 / 3,
        memory_gb=memory,
        memory_gb_per_s=rate,
        link_gb_per_s=link,
        watts=watts,
        share=share,
        share_source=why,
        url=f"https://docs.cloud.google.com/tpu/docs/{name.removesuffix('-core').removeprefix('tpu-')}",
    )


DEVICES = {
    d.name: d
    for d in (
        _gpu("v100", 125, 15.7, 15.7, 32, 900, 150, 300, "v100"),
        _gpu("a100", 312, 156, 19.5, 80, 2039, 300, 400, "a100"),
        _gpu("l40s", 362, 183, 91.6, 48, 864, 32, 350, "l40s"),
        _gpu("h100", 989, 494, 67, 80, 3350, 450, 700, "h100"),
        _gpu("h200", 989, 494, 67, 141, 4800, 450, 700, "h200"),
        _gpu("b200", 2250, 1125, 75, 180, 7700, 900, 1000, "dgx-b200"),
        _tpu("tpu-v3-core", 61.5, 16, 450, 70, 110, 0.265,
             f"830 ms for 32 images of NFNet-F4+ on a core, {_TABLE_3}"),
        _tpu("tpu-v4-core", 137.5, 16, 600, 100, 85, 0.39,
             "110k core hours for NFNet-F7+, 8 epochs of 4B images (Smith et al. 2023, arXiv 2310.16764)"),
        Device(
            name="cpu", tensor_flops=250e9, fp32_flops=110e9, tf32_flops=110e9, memory_gb=0, memory_gb_per_s=20,
            link_gb_per_s=5, watts=10, share=0.8,
            share_source="direct convolutions of oneDNN on AVX-512, docs/LOG.md; --measure replaces it",
            url="docs/LOG.md", is_cpu=True,
        ),
    )
}  # fmt: skip
"""A process on a CPU counts as one device, of one core; its memory is that of this machine."""


def device(name: str) -> Device:
    """By name, however it is spelled. UserError naming the known ones."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UserError(
            f"--device is {name!r}, which is not known; choose one of {', '.join(DEVICES)} ({nearest(name.lower(), DEVICES)})"
        )
    return found
