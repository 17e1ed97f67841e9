"""Packets: what is intact before a damage is used, and nothing behind it."""

import random

import pytest

from ddpm_hf.codec.packets import LONGEST, from_packets, packets_length, to_packets

CONTENT = random.Random(0).randbytes(700)
PACKETS = to_packets(CONTENT, 5)


def intact(data):
    return from_packets(data, 5, len(CONTENT), 1000)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 700, 100_000])
def test_content_comes_back(length):
    content = random.Random(1).randbytes(length)
    packets = to_packets(content, 9)
    assert len(packets) == packets_length(length)
    assert from_packets(packets, 9, length, 0) == (content, None)


def test_checksums_take_little():
    assert packets_length(400) < 400 * 1.08
    assert packets_length(10**6) < 10**6 * 1.001
    assert packets_length(10**6 + LONGEST) - packets_length(10**6) == LONGEST + 2


def test_every_truncation_leaves_the_content_of_the_whole_packets():
    known = 0
    for length in range(len(PACKETS)):
        content, problem = intact(PACKETS[:length])
        assert CONTENT.startswith(content)
        assert known <= len(content) <= length
        assert f"ends at byte {1000 + length:,} of {1000 + len(PACKETS):,}" in problem
        known = len(content)
    assert known > 500


def test_every_flipped_bit_ends_the_content_before_it():
    for bit in range(8 * len(PACKETS)):
        damaged = bytearray(PACKETS)
        damaged[bit // 8] ^= 1 << bit % 8
        content, problem = intact(bytes(damaged))
        assert CONTENT.startswith(content)
        assert content == intact(PACKETS[: bit // 8]).content
        assert "damaged between bytes" in problem


def test_packets_of_another_header_and_bytes_behind_the_end_are_seen():
    assert from_packets(PACKETS, 6, len(CONTENT), 0).content == b""
    content, problem = intact(PACKETS + b"abc")
    assert content == CONTENT
    assert "3 bytes behind its end" in problem
