"""The chunks of a PNG file."""

import zlib

_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MAX_TEXT_BYTES = 1 << 16
"""Texts above this are dropped where a PNG has too many: orientation and the like, which Pillow reads of them, are short."""
_MAX_PROFILE_BYTES = 1 << 20  # Pillow's limit of one that it unpacks


def without_large_texts(data: bytes) -> bytes:
    """A PNG without its text chunks that are large or compressed, and without a colour profile of more than a megabyte.

    The pixels stay as they are. What is no PNG to its end comes back from there on unchanged.
    """
    kept = [data[:8]]
    at = 8
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + size
        content = data[at + 8 : end - 4]
        packed = kind == b"zTXt" or (kind == b"iTXt" and content.partition(b"\0")[2][:1] == b"\1")
        is_large_text = kind in _TEXTS and (packed or size > _MAX_TEXT_BYTES)
        if not is_large_text and not (kind == b"iCCP" and _is_large_profile(content)):
            kept.append(data[at:end])
        at = end
    kept.append(data[at:])
    return b"".join(kept)


def _is_large_profile(content: bytes) -> bool:
    packed = content.partition(b"\0")[2][1:]
    try:
        return len(zlib.decompressobj().decompress(packed, _MAX_PROFILE_BYTES + 1)) > _MAX_PROFILE_BYTES
    except zlib.error:
        return False  # Pillow says what is wrong with it
