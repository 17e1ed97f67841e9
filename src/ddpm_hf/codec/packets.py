"""The bytes of a progressive file behind its header: packets with checksums, of which any prefix is of use.

    packet: content | CRC-16 of the header's checksum and of all contents so far, big-endian

A packet's length follows from what came before it (a quarter of that, from 16 to 4096 bytes), so that a file of a few
hundred bytes can be cut nearly anywhere, and checksums take little of a long one. CRC-16 finds every burst of up to 16
bits, and any other damage but for one in 65,536, in this packet and again in the next.
"""

from __future__ import annotations

import binascii
from typing import NamedTuple

SHORTEST, LONGEST = 16, 4096
CHECKSUM_BYTES = 2


class Received(NamedTuple):
    """What can be used of a stream of packets.

    Attributes:
        content: of the packets before the first that is damaged or incomplete.
        problem: what is wrong with that one; None if all are intact.
    """

    content: bytes
    problem: str | None


def to_packets(content: bytes, start: int) -> bytes:
    """The packets of this content.

    Args:
        start: the checksum that the first packet's continues.
    """
    parts, place, checksum = [], 0, start
    while place < len(content):
        part = content[place : place + _length(place)]
        checksum = binascii.crc_hqx(part, checksum)
        parts += [part, checksum.to_bytes(CHECKSUM_BYTES, "big")]
        place += len(part)
    return b"".join(parts)


def from_packets(data: bytes, start: int, total: int, offset: int) -> Received:
    """The content of as many packets as are intact.

    Args:
        data: behind the header.
        start: as in `to_packets`.
        total: the bytes of the whole content.
        offset: where `data` starts in the file, for messages.
    """
    parts, sent, place, checksum = [], 0, 0, start
    problem = None
    while sent < total and problem is None:
        length = min(_length(sent), total - sent)
        end = place + length + CHECKSUM_BYTES
        part = data[place : place + length]
        checksum = binascii.crc_hqx(part, checksum)
        if end > len(data):
            problem = f"ends at byte {offset + len(data):,} of {offset + packets_length(total):,}"
        elif checksum.to_bytes(CHECKSUM_BYTES, "big") != data[place + length : end]:
            problem = f"is damaged between bytes {offset + place:,} and {offset + end - 1:,}"
        else:
            parts.append(part)
            place, sent = end, sent + length
    if problem is None and place < len(data):
        problem = f"has {len(data) - place:,} bytes behind its end at byte {offset + place:,}"
    return Received(b"".join(parts), problem)


def packets_length(total: int) -> int:
    """The bytes of the packets of so many bytes."""
    place, count = 0, 0
    while place < total:
        place, count = place + _length(place), count + 1
    return total + CHECKSUM_BYTES * count


def _length(sent: int) -> int:
    return min(max(sent // 4, SHORTEST), LONGEST)
