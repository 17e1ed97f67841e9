"""The file: no damage goes unseen."""

import pytest

from ddpm_hf.codec.container import MAX_SECTION_BYTES, Section, join, pack, unpack

HEADER = {"codec": "lossless", "names": ["ä.png"]}
DATA = pack(HEADER, [Section(b"DATA", bytes(range(100))), Section(b"MORE", b"")])


def test_what_is_packed_is_unpacked():
    contents = unpack(DATA)
    assert contents.header == HEADER
    assert contents.sections == [Section(b"DATA", bytes(range(100))), Section(b"MORE", b"")]
    assert contents.damage is None


def test_long_contents_are_divided_and_joined():
    content = bytes(range(256)) * 1000
    sections = unpack(pack({}, [Section(b"DATA", content), Section(b"MORE", b"m")])).sections
    assert max(len(section.content) for section in sections) == MAX_SECTION_BYTES
    assert join(sections, b"DATA") == content


def test_every_flipped_bit_is_an_error():
    for bit in range(8 * len(DATA)):
        damaged = bytearray(DATA)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"damaged|starts with|version|ends at byte|holds no section"):
            unpack(bytes(damaged))


def test_every_truncation_and_every_appendage_is_an_error():
    for length in range(len(DATA)):
        with pytest.raises(ValueError, match=r"starts with|is empty|version|ends at byte"):
            unpack(DATA[:length])
    with pytest.raises(ValueError, match="3 bytes behind its end"):
        unpack(DATA + b"abc")


def test_an_error_names_the_damaged_bytes():
    damaged = bytearray(DATA)
    place = DATA.index(bytes(range(100))) + 50
    damaged[place] ^= 1
    with pytest.raises(ValueError, match=f"between bytes {place - 50 - 12} and {place + 49}"):
        unpack(bytes(damaged))


def test_what_is_intact_before_damage_can_be_had():
    contents = unpack(DATA[:-20], allow_damage=True)
    assert contents.header == HEADER
    assert "ends at byte" in contents.damage
    assert contents.sections == [Section(b"DATA", bytes(range(100)))]


def test_a_newer_version_says_what_to_do():
    with pytest.raises(ValueError, match="version 9 .* update it"):
        unpack(DATA[:8] + b"\x09" + DATA[9:])
