"""A rank's state copied into host memory, laid out byte for byte as the files that it becomes.

The copy is all that a training step waits for. The memory is taken once (page-locked where a GPU copies into it) and used
for every save; writing goes from it straight to disk. A file is safetensors, written by hand because the library would want
the tensors a second time; its header is padded so that the data begin at a page, which direct writing needs.
"""

import json
from dataclasses import dataclass

import torch

from pipeline.checkpoint.commit import BufferType
from pipeline.checkpoint.direct_io import ALIGN_BYTES

DTYPES: dict[torch.dtype, BufferType] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of tensors in files: all is fp32 but for some buffers."""
FILE_BYTES = 512 << 20
"""A rank's fragments are spread over files of about this size, which are hashed and written next to each other."""


@dataclass(frozen=True)
class Image:
    """One file in memory."""

    name: str
    kinds: tuple[str, ...]
    memory: torch.Tensor
    """uint8; starts at a page and is whole pages long."""
    size_bytes: int


class HostMemory:
    """The buffer that holds one snapshot. Not to be taken again before the former one is on disk."""

    def __init__(self, *, pin: bool) -> None:
        self._pin = pin
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def reserve(self, num_bytes: int) -> None:
        """Room for files of `num_bytes` in all, touched, so that the first copy is as fast as the others."""
        if self._buffer.numel() < num_bytes:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # the old one goes before the new one comes
            raw = torch.empty(num_bytes + ALIGN_BYTES, dtype=torch.uint8, pin_memory=self._pin)
            skip = -raw.data_ptr() % ALIGN_BYTES
            self._buffer = raw[skip : skip + num_bytes].zero_()

    def take(self, fragments: dict[str, torch.Tensor], stem: str) -> list[Image]:
        """Copies `fragments` ("kind/name@start" -> tensor on any device) and waits for the copy."""
        groups = _groups(fragments)
        headers = [_header({k: fragments[k] for k in keys}) for keys in groups]
        sizes = [len(h) + sum(fragments[k].nbytes for k in g) for h, g in zip(headers, groups, strict=True)]
        rooms = [_whole_pages(s) for s in sizes]
        self.reserve(sum(rooms))
        images, begin = [], 0
        for number, (keys, header, size, room) in enumerate(zip(groups, headers, sizes, rooms, strict=True)):
            memory = self._buffer[begin : begin + room]
            memory[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            offset = len(header)
            for key in keys:
                tensor = fragments[key].detach().reshape(-1)
                memory[offset : offset + tensor.nbytes].view(tensor.dtype).copy_(tensor, non_blocking=True)
                offset += tensor.nbytes
            memory[size:].zero_()
            name = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}.{number:03d}.safetensors"
            images.append(Image(name, tuple(sorted({k.split("/", 1)[0] for k in keys})), memory, size))
            begin += room
        if self._pin:
            torch.cuda.synchronize()
        return images


def room_bytes(num_bytes: int) -> int:
    """Bytes of host memory for fragments of `num_bytes` in all, headers included, generously."""
    return _whole_pages(num_bytes + (num_bytes >> 8) + (1 << 20))


def _groups(fragments: dict[str, torch.Tensor]) -> list[list[str]]:
    """Keys by file; of wide types first, so that each tensor begins at a multiple of its elements' size."""
    groups: list[list[str]] = []
    filled = FILE_BYTES
    for key, tensor in sorted(fragments.items(), key=lambda item: -item[1].element_size()):
        if filled + tensor.nbytes > FILE_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(key)
        filled += tensor.nbytes
    return groups


def _header(tensors: dict[str, torch.Tensor]) -> bytes:
    entries, offset = {}, 0
    for key, tensor in tensors.items():
        end = offset + tensor.nbytes
        entries[key] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = _whole_pages(8 + len(text)) - 8
    return length.to_bytes(8, "little") + text.ljust(length)  # the format allows spaces at the end


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
