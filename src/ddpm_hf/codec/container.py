"""The file: a magic number, a version, and sections, each with its checksum, so that no damage goes unseen.

    89 'D' 'D' 'P' 'M' 0D 0A 1A | version, 1 byte | sections

    section: tag, 4 bytes | length of the content, uint32 | CRC-32 of tag, length and content, uint32 | content

All integers are little-endian. The first section is `HEAD`, JSON in zlib; the last one is `END.`, empty. What lies
between is the codec's own, in sections of at most 64 KiB, so that an error can say which bytes are damaged.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

MAGIC = b"\x89DDPM\r\n\x1a"  # as in PNG: transfers as text, or in 7 bits, damage it
VERSION = 1
MAX_SECTION_BYTES = 2**16
MAX_HEADER_BYTES = 50_000_000  # of JSON: a million file names
HEADER, END = b"HEAD", b"END."
_FRAME = struct.Struct("<4sII")
_DAMAGED = "copy or download it again, it can't be decoded"


class Section(NamedTuple):
    """A section of a file."""

    tag: bytes
    content: bytes


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        header: the mapping of `HEAD`.
        sections: those between header and end, in the order of the file.
        damage: where and how the file is damaged, after the last section that is intact; None for a whole file.
    """

    header: dict[str, Any]
    sections: list[Section]
    damage: str | None


def pack(header: dict[str, Any], sections: list[Section]) -> bytes:
    """A file of these. Contents of more than 64 KiB are divided into several sections of one tag."""
    parts = [pack_header(header)]
    for section in sections:
        parts += _frame(section.tag, section.content, MAX_SECTION_BYTES)
    return b"".join([*parts, *_frame(END, b"", MAX_SECTION_BYTES)])


def pack_header(header: dict[str, Any]) -> bytes:
    """The start of a file, up to where its first section after the header begins."""
    return b"".join([MAGIC, bytes([VERSION]), *_frame(HEADER, zlib.compress(_json(header), 9), MAX_HEADER_BYTES)])


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """The mapping of `HEAD`, and where what follows it begins, whatever that is.

    Raises:
        ValueError: for a file whose header is damaged.
    """
    header = unpack(data, allow_damage=True).header
    return header, len(MAGIC) + 1 + _FRAME.size + _FRAME.unpack_from(data, len(MAGIC) + 1)[1]


def unpack(data: bytes, *, allow_damage: bool = False) -> Contents:
    """The contents of a file, all checksums compared.

    Args:
        allow_damage: return what is intact before the first damage, for a code of which any prefix is of use. The
            header must be intact.

    Raises:
        ValueError: names the bytes, for any other file.
    """
    if data[: len(MAGIC)] != MAGIC:
        found = "is empty" if not data else f"starts with {data[: len(MAGIC)].hex(' ')}"
        raise ValueError(
            f"the file {found}, but a file of `ddpm-hf compress` starts with {MAGIC.hex(' ')}: it is none, or "
            "it was damaged, e.g. by a transfer as text."
        )
    version = data[len(MAGIC)] if len(data) > len(MAGIC) else None
    if version != VERSION:
        raise ValueError(
            f"the file has version {version} of the format, but this ddpm-hf reads version {VERSION}: "
            f"{'update it with pip install -U ddpm-hf' if version and version > VERSION else _DAMAGED}."
        )
    sections, damage = [], "the file holds no section"
    try:
        for section in _sections(data, len(MAGIC) + 1):
            sections.append(section)
        damage = ""
    except ValueError as error:
        damage = str(error)
    if not sections or sections[0].tag != HEADER or (damage and not allow_damage):
        raise ValueError(f"{damage or 'the file has no header'}: {_DAMAGED}.")
    return Contents(_read_json(sections[0].content), [s for s in sections[1:] if s.tag != END], damage or None)


def join(sections: list[Section], tag: bytes) -> bytes:
    """The content of a tag, which `pack` may have divided."""
    return b"".join(section.content for section in sections if section.tag == tag)


def _frame(tag: bytes, content: bytes, limit: int) -> Iterator[bytes]:
    for start in range(0, max(len(content), 1), limit):
        part = content[start : start + limit]
        yield _FRAME.pack(tag, len(part), _checksum(tag, part))
        yield part


def _checksum(tag: bytes, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(tag + struct.pack("<I", len(content))))


def _sections(data: bytes, place: int) -> Iterator[Section]:
    while True:
        content = place + _FRAME.size
        if content > len(data):
            raise ValueError(f"the file ends at byte {len(data):,}, in the middle of a section")
        tag, length, checksum = _FRAME.unpack_from(data, place)
        end = content + length
        part = data[content:end]
        if end > len(data) and not _is_plausible(tag, length):
            raise ValueError(f"the file is damaged at byte {place:,}")
        if end > len(data):
            raise ValueError(
                f"the file ends at byte {len(data):,}, but its section from byte {place:,} ends at {end:,}"
            )
        if checksum != _checksum(tag, part):
            raise ValueError(f"the file is damaged between bytes {place:,} and {end - 1:,} (its checksum differs)")
        yield Section(tag, part)
        if tag == END:
            if end < len(data):
                raise ValueError(f"the file has {len(data) - end:,} bytes behind its end at byte {end:,}")
            return
        place = end


def _is_plausible(tag: bytes, length: int) -> bool:
    return length <= (MAX_HEADER_BYTES if tag == HEADER else MAX_SECTION_BYTES)


def _json(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _read_json(content: bytes) -> dict[str, Any]:
    try:
        decompressor = zlib.decompressobj()
        text = decompressor.decompress(content, MAX_HEADER_BYTES)
        if not decompressor.eof:
            raise ValueError(f"it has more than {MAX_HEADER_BYTES:,} bytes")
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("it is no mapping")
    except (ValueError, RecursionError, zlib.error) as error:
        raise ValueError(f"the header of the file is damaged ({error}): {_DAMAGED}.") from error
    return header
