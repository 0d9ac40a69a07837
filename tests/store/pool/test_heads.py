"""What makes an object visible: a head is exactly what was written, or it is none."""

import json

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from kvedit.store.pool.heads import HEAD_BYTES, MOST_PARTS, Head

DIGEST = blake3(b"bytes").hexdigest()
heads = st.builds(Head, st.just(DIGEST), st.integers(0, 1 << 26), st.integers(1024, 1 << 30))


@given(heads)
def test_a_head_comes_back(head):
    assert Head.from_bytes(head.to_bytes()) == head
    assert len(head.to_bytes()) <= HEAD_BYTES


@given(heads, st.data())
def test_a_changed_byte_gives_no_head_or_another_sound_one(head, data):
    flipped = bytearray(head.to_bytes())
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = Head.from_bytes(bytes(flipped))
    assert found is None or (found != head and found.to_bytes() == bytes(flipped))


@given(st.binary(max_size=100))
def test_any_bytes_are_read_without_an_error(data):
    assert Head.from_bytes(data) is None


@pytest.mark.parametrize("size", [(MOST_PARTS << 10) + 1, -1, 1.0, True, "1", None, [1]])
def test_a_size_that_is_none(size):
    fields = {"digest": DIGEST, "parts": 1, "size": size, "value_bytes": 1024}
    assert (
        Head.from_bytes(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()) is None
    )


@given(st.integers(0, 10_000), st.integers(1, 1000))
def test_ranges_cover_the_object_once(size, value_bytes):
    head = Head(DIGEST, size, value_bytes)
    covered = [index for begin, end in head.ranges() for index in range(begin, end)]
    assert covered == list(range(size))
    assert len(set(head.part_keys("", "key"))) == head.parts == len(list(head.ranges()))
